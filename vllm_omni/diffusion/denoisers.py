"""What a denoiser class looks like from outside, as data: its block stack and the role of its arguments.

A new family is one more entry. Knows no tensors and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DENOISER_NAMES = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class BlockList:
    """One `ModuleList` of the stack: its attribute, and what each of its blocks returns, in order."""

    name: str
    returns: tuple[str, ...]  # ("hidden_states",) means the bare tensor


@dataclass(frozen=True)
class DenoiserSpec:
    """`stack` in execution order; `rows` hold one entry per sample, `shared` must be equal to be batched together."""

    stack: tuple[BlockList, ...]
    rows: tuple[str, ...]
    shared: tuple[str, ...] = ()
    only_for_blocks: tuple[str, ...] = ()  # child modules whose output nothing but the blocks reads
    between_blocks: tuple[str, ...] = ()  # "argument" or "argument.key" that adds something to the stack: compute

    def adds_between_blocks(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call brings something that a residual of another step does not hold."""
        for path in self.between_blocks:
            name, _, key = path.partition(".")
            value = arguments.get(name)
            if value is not None and (not key or key in value):
                return True
        return False


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
        # FLUX.2 joins the text stream to the image before its single blocks: its embedding is read without them, too
    ),
    "QwenImageTransformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _JOINT),),
        rows=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes"),
        shared=("img_shapes",),
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
    "LTXVideoTransformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _HIDDEN),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
    ),
    "CogVideoXTransformer3DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT),),
        rows=("hidden_states", "encoder_hidden_states", "timestep"),
        shared=("image_rotary_emb",),
    ),
    "AuraFlowTransformer2DModel": DenoiserSpec(
        stack=(BlockList("joint_transformer_blocks", _JOINT), BlockList("single_transformer_blocks", _HIDDEN)),
        rows=("hidden_states", "encoder_hidden_states", "timestep"),
    ),
    "CogView4Transformer2DModel": DenoiserSpec(
        stack=(BlockList("transformer_blocks", _IMAGE_TEXT),),
        rows=("hidden_states", "encoder_hidden_states", "timestep", "original_size", "target_size", "crop_coords"),
    ),
}
