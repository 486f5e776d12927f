"""A tiny plain pipeline, its latents without a cache, and a profile that was calibrated on it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from diffusers import FluxPipeline
from pipelines import run_latents, tiny_flux
from probing import probed

from vllm_omni.diffusion.cache.magcache import (
    MagCacheBackend,
)
from vllm_omni.diffusion.cache.profile import CacheProfile, fingerprint
from vllm_omni.diffusion.data import DiffusionCacheConfig


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return tiny_flux()


@pytest.fixture(scope="module")
def plain(pipe: FluxPipeline) -> dict[int, torch.Tensor]:
    """Latents without any cache, by step count."""
    return {steps: run_latents(pipe, num_inference_steps=steps) for steps in (4, 10, 28, 50)}


@pytest.fixture(scope="module")
def calibrated(pipe: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheProfile, Path]:
    """A profile of tiny_flux from two prompts at 12 steps, one of them with two branches."""
    pipeline = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    backend.enable(pipeline)
    with probed(pipeline) as probe:
        run_latents(pipeline, num_inference_steps=12)
        run_latents(pipeline, i=1, seed=1, num_inference_steps=12)
    assert backend.calibration is not None and all(probe.ran)
    profile = backend.calibration.profile("tiny", "FluxTransformer2DModel", fingerprint(pipe.transformer))
    backend.disable(pipeline)

    runs = [probe.added[:12], probe.added[12:]]
    ratios, grams = [], []
    for residuals in runs:
        norms = [r.double().norm(dim=-1) for r in residuals]
        ratios.append([1.0, *(float((b / a).mean()) for a, b in pairwise(norms))])
        flat = torch.stack([r.double().flatten() for r in residuals]).numpy()
        grams.append(flat @ flat.T / flat.shape[1])
    assert_close(np.float32(profile.ratios), np.mean(ratios, axis=0))
    assert profile.gram is not None
    assert_close(np.float32(profile.gram), np.mean(grams, axis=0))
    path = tmp_path_factory.mktemp("profiles") / "deeper" / "tiny.json"
    profile.save(path)
    return profile, path
