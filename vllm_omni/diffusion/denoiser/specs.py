"""Denoiser classes as data: the block stack of each, and the role of its arguments.

A new family is one more entry. Knows no tensors and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DENOISER_NAMES = ("transformer", "transformer_2", "unet")  # the pipeline components that can be denoisers


@dataclass(frozen=True)
class BlockList:
    """A `ModuleList` of the stack: where it is, what each of its blocks returns, in order, and what it takes.

    Whatever is returned continues an argument, and is named after it. `takes` names those that come by position.
    """

    name: str  # "blocks", or "decoder.blocks"
    returns: tuple[str, ...]  # ("hidden_states",) means the bare tensor; "" stands for None
    takes: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    streams: tuple[str, ...] = ("hidden_states",)  # of `returns`, what the head reads: what is cached
    in_tuple: bool = False  # also if it is one


@dataclass(frozen=True)
class Text:
    """An argument, one of `rows`, whose length may differ from sample to sample of a forward.

    With a `mask` argument it is a tensor (rows, tokens, channels), and the model leaves out what the mask leaves out:
    shorter texts are padded. Without one it is a list of tensors that the model itself pads, to a multiple of `padded`.
    """

    name: str
    mask: str = ""
    padded: int = 1


@dataclass(frozen=True)
class DenoiserSpec:
    """The block lists of `stack` in execution order, and the denoiser's arguments by role.

    `rows` hold one entry per sample; `shared` arguments must be equal for calls to be batched. An argument in both has
    one entry per sample and decides how samples are laid out in the stack, so only equal ones fit.
    """

    stack: tuple[BlockList, ...]
    rows: tuple[str, ...]
    shared: tuple[str, ...] = ()
    rows_in_dim_1: tuple[str, ...] = ()  # of `rows`, those with another dimension before the samples
    texts: tuple[Text, ...] = ()
    image_first: bool = False  # a fused tail holds the image tokens before the text
    only_for_blocks: tuple[str, ...] = ()  # child modules whose output nothing but the blocks reads
    between_blocks: tuple[str, ...] = ()  # "argument" or "argument.key" that adds something to the stack: compute
    alone: tuple[str, ...] = ()  # arguments with which a call returns something that has no rows
    every_place: bool = False  # the model counts its blocks: without them, there is a stand-in in each one's place
    in_place: bool = False  # blocks write into what they are given

    def adds_between_blocks(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call adds something between blocks that a residual of another step does not contain."""
        for path in self.between_blocks:
            name, _, key = path.partition(".")
            value = arguments.get(name)
            if value is not None and (not key or key in value):
                return True
        return False


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_JOINT = ("encoder_hidden_states", "hidden_states")
_IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")
_HIDDEN = ("hidden_states",)
_IP_ADAPTER = ("joint_attention_kwargs.ip_adapter_image_embeds", "joint_attention_kwargs.ip_hidden_states")
_FLUX_ROWS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")

DENOISERS: dict[str, DenoiserSpec] = {
    "FluxTransformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _JOINT), BlockList("single_transformer_blocks", _JOINT)),
        rows=_FLUX_ROWS,
        shared=("img_ids", "txt_ids"),
        only_for_blocks=("context_embedder", "pos_embed"),
        between_blocks=("controlnet_block_samples", "controlnet_single_block_samples", *_IP_ADAPTER),
    ),
    "Flux2Transformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _JOINT), BlockList("single_transformer_blocks", ("hidden_states",))),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "guidance"),
        shared=("img_ids", "txt_ids"),
        alone=("kv_cache_mode",),
        # FLUX.2 joins the text stream to the image before its single blocks: its embedding is read even if none runs
    ),
    "QwenImageTransformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _JOINT),),
        rows=_names(
            "hidden_states encoder_hidden_states encoder_hidden_states_mask "
            "timestep guidance additional_t_cond img_shapes"
        ),
        texts=(Text("encoder_hidden_states", "encoder_hidden_states_mask"),),
        between_blocks=("controlnet_block_samples",),
    ),
    "SD3Transformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _JOINT),),
        rows=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        between_blocks=("block_controlnet_hidden_states", "skip_layers", *_IP_ADAPTER),
    ),
    "WanTransformer3DModel": DenoiserSpec(
        stack=(BlockList("blocks", _HIDDEN),),
        rows=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image"),
    ),
    "ChromaTransformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _JOINT), BlockList("single_transformer_blocks", _HIDDEN)),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "attention_mask"),
        shared=("img_ids", "txt_ids"),
        between_blocks=("controlnet_block_samples", "controlnet_single_block_samples", *_IP_ADAPTER),
    ),
    "HunyuanVideoTransformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT), BlockList("single_transformer_blocks", _IMAGE_TEXT)),
        rows=("encoder_attention_mask", *_FLUX_ROWS),
    ),
    "HunyuanVideo15Transformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT),),
        rows=_names(
            "hidden_states timestep timestep_r encoder_hidden_states "
            "encoder_attention_mask encoder_hidden_states_2 encoder_attention_mask_2 image_embeds"
        ),
    ),
    "LTXVideoTransformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _HIDDEN),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "video_coords"),
    ),
    "CogVideoXTransformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond"),
        shared=("image_rotary_emb", "ofs"),
    ),
    "AuraFlowTransformer2DModel": DenoiserSpec(
        stack=(BlockList("joint_transformer_blocks", _JOINT), BlockList("single_transformer_blocks", _HIDDEN)),
        rows=("hidden_states", "encoder_hidden_states", "timestep"),
    ),
    "CogView4Transformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT),),
        rows=_names(
            "hidden_states encoder_hidden_states timestep original_size target_size crop_coords attention_mask"
        ),
    ),
    "ZImageTransformer2DModel": DenoiserSpec(
        stack=(BlockList("layers", _HIDDEN),),
        rows=("x", "t", "cap_feats"),
        texts=(Text("cap_feats", padded=32),),
        between_blocks=("controlnet_block_samples",),
    ),
    "HiDreamImageTransformer2DModel": DenoiserSpec(
        stack=(BlockList("double_stream_blocks", _IMAGE_TEXT), BlockList("single_stream_blocks", _HIDDEN)),
        rows=_names(
            "hidden_states timesteps encoder_hidden_states_t5 encoder_hidden_states_llama3 "
            "pooled_embeds hidden_states_masks img_ids img_sizes"
        ),
        rows_in_dim_1=("encoder_hidden_states_llama3",),
        image_first=True,
    ),
    "Lumina2Transformer2DModel": DenoiserSpec(
        stack=(BlockList("layers", _HIDDEN),),
        rows=("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
        shared=("encoder_attention_mask",),  # text and image share a sequence without padding: its length says where
    ),
    "SanaTransformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _HIDDEN),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "guidance", "encoder_attention_mask"),
        between_blocks=("controlnet_block_samples",),
    ),
    "PixArtTransformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _HIDDEN),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs", "encoder_attention_mask"),
    ),
    "Kandinsky5Transformer3DModel": DenoiserSpec(
        stack=(BlockList("visual_transformer_blocks", _HIDDEN),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"),
        shared=("visual_rope_pos", "text_rope_pos", "sparse_params"),
    ),
    "MochiTransformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
    ),
}


def unwrapped(module: Any) -> Any:
    """The module inside wrappers of `torch.compile` and PEFT; any other module as it is."""
    children = module._modules
    if (compiled := children.get("_orig_mod")) is not None:
        return unwrapped(compiled)
    tuner = children.get("base_model")  # of a PeftModel: it holds the model whose layers it has changed
    if tuner is not None and "peft_config" in vars(module) | vars(tuner) and "model" in tuner._modules:
        return unwrapped(tuner._modules["model"])
    return module


def spec_of(module: Any) -> DenoiserSpec | None:
    """The spec of a denoiser, of the module inside a wrapper, or of the class it derives from."""
    return next((DENOISERS[c.__name__] for c in type(unwrapped(module)).__mro__ if c.__name__ in DENOISERS), None)


def denoisers_of(pipeline: Any) -> dict[str, Any]:
    """The denoisers that a pipeline, or anything with a `transformer`, has, by component name."""
    found = {name: getattr(pipeline, name, None) for name in DENOISER_NAMES}
    return {name: module for name, module in found.items() if module is not None}
