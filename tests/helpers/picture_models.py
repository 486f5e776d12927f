"""Tiny models on disk that take other pictures than one: FLUX.1 Fill (a mask too), FLUX.2 klein (optional, several)."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from families import TEXT, _flux_parts, flux2_klein, flux_fill
from pipelines import DEMO, save_tiny_flux
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SIDE = 64


def fill_folder(folder: Path) -> Path:
    parts = _flux_parts(diffusers.FluxPipeline.from_pretrained(save_tiny_flux(folder / "flux")))
    diffusers.FluxFillPipeline(**parts | {"transformer": flux_fill().transformer}).save_pretrained(folder / "fill")
    return _with_defaults(folder / "fill", max_sequence_length=16)


def klein_folder(folder: Path) -> Path:
    klein = flux2_klein()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO / "tokenizer_2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    sizes = {"num_hidden_layers": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=len(tokenizer) + 64, hidden_size=TEXT, intermediate_size=16, **sizes)
        encoder = Qwen3ForCausalLM(config).eval()
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=klein.scheduler,
        vae=klein.vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=klein.transformer,
    )
    pipeline.save_pretrained(folder / "klein")
    return _with_defaults(folder / "klein", max_sequence_length=32)


def _with_defaults(model: Path, **own: int) -> Path:
    own |= {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
    (model / "generation_config.json").write_text(json.dumps(own))
    return model
