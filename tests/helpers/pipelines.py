"""Tiny pipelines with random weights, and a counter of block forwards, for all tests. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from paths import DEMO

from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy
from vllm_omni.diffusion.denoiser.specs import DENOISER_NAMES, DENOISERS

CURVE = FluxMagCacheStrategy.FLUX_MAG_RATIOS
DEFAULTS = {"height": 32, "width": 32}
TEXT_TOKENS, TEXT_DIM = 8, 32


def tiny_flux(guidance: bool = True, seed: int = 0) -> FluxPipeline:
    """A FluxPipeline (2 double + 3 single blocks, width 32) without text encoders: give it `embeds(i)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=32,
            shift_factor=0.1,
            scaling_factor=0.36,
        )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_flux(folder: Path) -> Path:
    """A whole model folder that loads: `tiny_flux()` with tiny text encoders, and the demo's tokenizers."""
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pipeline = tiny_flux()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO / "tokenizer")
    tokenizer_2 = PreTrainedTokenizerFast.from_pretrained(DEMO / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer) + 64, hidden_size=TEXT_DIM, **sizes))
        sizes = {"num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32}
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_2) + 64, d_model=TEXT_DIM, **sizes))
    pipeline.register_modules(text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=tokenizer_2)
    pipeline.save_pretrained(folder)
    return folder


def embeds(i: int = 0) -> dict[str, torch.Tensor]:
    """Conditioning number `i`, as the keyword arguments of the pipeline's call (or an engine prompt)."""
    generator = torch.Generator().manual_seed(1000 + i)
    return {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, TEXT_DIM, generator=generator),
    }


def negative(i: int = 0) -> dict[str, torch.Tensor]:
    """The opposite of `embeds(i)`, as negative conditioning."""
    return {f"negative_{name}": -value for name, value in embeds(i).items()}


class BlockCounter:
    """How often the first transformer block ran since the last `reset()`: the full forwards really made."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.count = 0
        self.rows = 0
        self._handle = block.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.count += 1
        self.rows += (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[0]

    def reset(self) -> None:
        self.count = self.rows = 0

    def remove(self) -> None:
        self._handle.remove()


def count_blocks(pipeline: Any) -> BlockCounter:
    """Counts forwards of the first block of the pipeline's transformer."""
    return BlockCounter(pipeline.transformer.transformer_blocks[0])


class Blocks:
    """Forwards of the first block of every denoiser of a pipeline; with `rows`, the samples in them."""

    def __init__(self, pipeline: Any, rows: bool = False) -> None:
        modules = [m for name in DENOISER_NAMES if (m := pipeline.components.get(name)) is not None]
        lists = [m.get_submodule(DENOISERS[type(m).__name__].stack[0].name) for m in modules]
        self.counts = [0] * len(lists)
        for i, blocks in enumerate(lists):
            blocks[0].register_forward_hook(lambda _, args, __, i=i: self._note(i, len(args[0]) if rows else 1))

    def _note(self, i: int, count: int) -> None:
        self.counts[i] += count

    @property
    def count(self) -> int:
        return sum(self.counts)

    def reset(self) -> None:
        self.counts = [0] * len(self.counts)


def run_latents(pipeline: Any, i: int = 0, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """Latents of one plain call of a tiny pipeline."""
    arguments = {**DEFAULTS, **embeds(i), "output_type": "latent", **kwargs}
    return pipeline(generator=torch.Generator("cpu").manual_seed(seed), **arguments).images


def tiny_flux2(seed: int = 0) -> Any:
    """A Flux2Transformer2DModel alone (2 double + 2 single blocks): its pipeline's text encoder is a Mistral."""
    from diffusers import Flux2Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        ).eval()


def flux2_inputs(step: int = 0, steps: int = 10, tokens: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of one call of `tiny_flux2()`; the latents drift with the step, as in a real run."""
    generator = torch.Generator().manual_seed(seed)
    noise, drift = (torch.randn(1, tokens, 16, generator=generator) for _ in range(2))
    return {
        "hidden_states": noise + drift * step / steps,
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "timestep": torch.tensor([1 - step / steps]),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(tokens // 4), torch.arange(1)),
        "txt_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, TEXT_TOKENS))),
        "guidance": torch.tensor([4.0]),
    }


def tiny_wan(seed: int = 0) -> Any:
    """A whole WanPipeline (3 blocks, tiny VAE and text encoder, the demo's tokenizer): text to 32x32 frames."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=3,
        )
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
        sizes = {"num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32}
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer) + 64, d_model=TEXT_DIM, **sizes))
        for parameter in transformer.parameters():  # tables that begin at zero would hide what the blocks do
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
