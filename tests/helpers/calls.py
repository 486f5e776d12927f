"""Calls of a tiny cached pipeline, in this thread and in the engine's."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from pipelines import CURVE, DEFAULTS, embeds

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.outputs import OmniRequestOutput

CACHED: dict[str, Any] = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}, "defaults": DEFAULTS}


def latents(omni: Omni, i: int = 0, steps: int = 8) -> torch.Tensor:
    (output,) = omni.generate(
        embeds(i), Params(num_inference_steps=steps, seed=i, output_type="latent"), use_tqdm=False
    )
    assert output.ok, output.error
    return output.latents


async def final(omni: AsyncOmni, i: int = 0, request_id: str | None = None, **given: Any) -> OmniRequestOutput:
    params = Params(**{"num_inference_steps": 8, "seed": i, "output_type": "latent"} | given)
    return [output async for output in omni.generate(embeds(i), params, request_id)][-1]


def within(seconds: float, awaitable: Any) -> Any:
    return asyncio.wait_for(awaitable, seconds)
