"""LoRA adapters with random weights for any denoiser, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict

TARGETS = ["to_q", "to_v", "to_out.0"]


def save_adapter(pipeline: Any, folder: Path, seed: int) -> Path:
    """An adapter for the pipeline's transformer, with weights large enough to see; the pipeline is left without it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=TARGETS)
        pipeline.transformer.add_adapter(config, adapter_name="made")
    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="made")
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    pipeline.unload_lora_weights()
    return folder


def save_text_adapter(pipeline: Any, folder: Path, seed: int) -> Path:
    """An adapter for the pipeline's first text encoder, likewise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        pipeline.text_encoder.add_adapter(config, adapter_name="made")
    layers = get_peft_model_state_dict(pipeline.text_encoder, adapter_name="made")
    pipeline.save_lora_weights(folder, text_encoder_lora_layers=layers)
    pipeline.unload_lora_weights()
    return folder
