"""One tiny pipeline with random weights per family, and its conditioning: a new family is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from pipelines import tiny_flux

TEXT = 32


@dataclass(frozen=True)
class Family:
    """`build` makes the pipeline; `embeds` are the shapes of a prompt's tensors, negated where `negative` is."""

    name: str
    build: Callable[[], Any]
    embeds: dict[str, tuple[int, ...]]
    masks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mask_type: torch.dtype = torch.long
    negative: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"

    def prompt(self, i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + i)
        given = {name: torch.randn(shape, generator=generator) for name, shape in self.embeds.items()}
        given |= {name: torch.ones(shape, dtype=self.mask_type) for name, shape in self.masks.items()}
        if self.negative:
            opposite = {n: -v if n in self.embeds else v for n, v in given.items()}
            given |= {NEGATIVE.get(n, f"negative_{n}"): v for n, v in opposite.items()}
        return given


NEGATIVE = {"pooled_prompt_embeds": "negative_pooled_prompt_embeds"}


def _made(pipeline: type, transformer: type, sizes: dict[str, Any], scheduler: Any = None, **parts: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformer(**sizes).eval()
        for parameter in model.parameters():  # tables that begin at zero would hide what the blocks do
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    made = pipeline(
        transformer=model,
        scheduler=scheduler or d.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL: dict[str, Any] = {"height": 32, "width": 32}
CLIP = {"text_encoder_2": None, "tokenizer_2": None}


def qwen() -> Any:
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": TEXT}
    sizes |= {"axes_dims_rope": (4, 6, 6)}
    return _made(d.QwenImagePipeline, d.QwenImageTransformer2DModel, HEADS | sizes)


def sd3() -> Any:
    sizes = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": TEXT}
    sizes |= {"caption_projection_dim": 32, "pooled_projection_dim": TEXT, "pos_embed_max_size": 8}
    more = CLIP | {"text_encoder_3": None, "tokenizer_3": None}
    return _made(d.StableDiffusion3Pipeline, d.SD3Transformer2DModel, HEADS | sizes, **more)


def wan() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 64, "num_layers": 3}
    return _made(d.WanPipeline, d.WanTransformer3DModel, HEADS | sizes)


def chroma() -> Any:
    sizes = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT}
    sizes |= {"axes_dims_rope": (4, 6, 6), "approximator_num_channels": 8, "approximator_hidden_dim": 32}
    return _made(d.ChromaPipeline, d.ChromaTransformer2DModel, HEADS | sizes | {"approximator_layers": 1})


def hunyuan_video() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    sizes |= {"text_embed_dim": TEXT, "pooled_projection_dim": TEXT, "rope_axes_dim": (4, 6, 6)}
    return _made(d.HunyuanVideoPipeline, d.HunyuanVideoTransformer3DModel, HEADS | sizes, **CLIP)


def ltx() -> Any:
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 3, "caption_channels": TEXT}
    return _made(d.LTXPipeline, d.LTXVideoTransformer3DModel, HEADS | sizes)


def cogvideox() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": TEXT, "num_layers": 3}
    sizes |= {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 8}
    rope = {"use_rotary_positional_embeddings": True}
    return _made(d.CogVideoXPipeline, d.CogVideoXTransformer3DModel, HEADS | sizes | rope, d.CogVideoXDDIMScheduler())


def aura_flow() -> Any:
    sizes = {"sample_size": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT}
    sizes |= {"caption_projection_dim": 32, "pos_embed_max_size": 16}
    return _made(d.AuraFlowPipeline, d.AuraFlowTransformer2DModel, HEADS | sizes)


def cogview4() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT, "time_embed_dim": 16}
    sizes |= {"condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 4, "rope_axes_dim": (8, 8)}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return _made(d.CogView4Pipeline, d.CogView4Transformer2DModel, HEADS | sizes, scheduler)


TOKENS = {"prompt_embeds": (1, 8, TEXT)}
POOLED = TOKENS | {"pooled_prompt_embeds": (1, TEXT)}
MASK = {"prompt_attention_mask": (1, 8)}
VIDEO = SMALL | {"num_frames": 5}
TRUE_CFG = "true_cfg_scale"

FAMILIES = [
    Family("FLUX.1", tiny_flux, POOLED, settings=SMALL, guidance=TRUE_CFG),
    Family("Qwen-Image", qwen, TOKENS, {"prompt_embeds_mask": (1, 8)}, settings=SMALL, guidance=TRUE_CFG),
    Family("Stable Diffusion 3", sd3, POOLED, settings=SMALL),
    Family("Wan 2.1", wan, TOKENS, settings=VIDEO),
    Family("Chroma", chroma, TOKENS, MASK, torch.bool, settings=SMALL),
    Family("HunyuanVideo", hunyuan_video, POOLED, MASK, settings=VIDEO, guidance=TRUE_CFG),
    Family("LTX-Video", ltx, TOKENS, MASK, settings={"height": 64, "width": 64, "num_frames": 9}),
    Family("CogVideoX", cogvideox, TOKENS, settings=VIDEO),
    Family("AuraFlow", aura_flow, TOKENS, MASK, settings=SMALL),
    Family("CogView4", cogview4, TOKENS, settings=SMALL),
]
