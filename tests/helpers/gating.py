"""Settings of every gate at which a random model's run both skips and computes."""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.selector import get_cache_backend

STEPS = 12
# Thresholds at which a random model's run both skips and computes.
GATES: dict[str, dict[str, Any]] = {
    "easycache": {"rel_l1_thresh": 0.12},
    "seacache": {"rel_l1_thresh": 0.2},
    "teacache": {"rel_l1_thresh": 0.25, "coefficients": [1.0, 0.02]},
    "fbcache": {"rel_l1_thresh": 0.25},
}


def params(cache: Any, seed: int = 0, steps: int = STEPS, **others: Any) -> Params:
    return Params(num_inference_steps=steps, seed=seed, cache=cache, output_type="latent", **others)


def asked(name: str, **more: Any) -> dict[str, Any]:
    return {"backend": name, **GATES[name], **more}


def l1(a: torch.Tensor) -> float:
    return float(a.float().abs().mean())


def enabled(name: str, pipeline: Any, **more: Any) -> Any:
    backend = get_cache_backend(name, {**GATES[name], **more})
    assert backend is not None
    backend.enable(pipeline)
    return backend
