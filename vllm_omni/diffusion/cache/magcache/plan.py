"""From settings, a curve and a schedule to one request's plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vllm_omni.diffusion.cache.curve import resample
from vllm_omni.diffusion.cache.plan import magcache_plan, mask_plan
from vllm_omni.diffusion.cache.predictor import forecasts, resample_gram
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.request_cache import CachePlan
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError


def choose_predictor(config: DiffusionCacheConfig, profile: CacheProfile | None) -> str:
    """`auto` is what calibration found best for this checkpoint, otherwise reuse, which every curve allows."""
    has_gram = profile is not None and profile.gram is not None
    if config.predictor == "auto":
        return (profile.predictor if profile is not None else None) or "reuse"
    if config.predictor == "gram" and not has_gram:
        raise InvalidValueError(
            "predictor", "gram", "needs a calibrated profile of this checkpoint (vllm-omni calibrate)"
        )
    return config.predictor


@lru_cache(maxsize=256)
def plan_request(
    config: DiffusionCacheConfig,
    ratios: tuple[float, ...] | None,
    profile: CacheProfile | None,
    steps: int,
    sigmas: tuple[float, ...],
) -> CachePlan:
    """The whole run, decided before its first step."""
    if config.steps_mask is not None:
        compute = mask_plan(config.steps_mask, steps, config.compute_last_step)
    else:
        if ratios is None:
            raise InvalidValueError("mag_ratios", None, "must be given where no steps_mask is and no curve is known")
        compute = magcache_plan(
            resample(ratios, steps, config.curve_resampling),
            config.mag_threshold,
            config.mag_max_skip_steps,
            config.mag_retention_ratio,
            config.compute_last_step,
        )
    predictor = choose_predictor(config, profile)
    gram = _gram_at(profile, sigmas) if predictor == "gram" and profile is not None else None
    return CachePlan.of(compute, forecasts(compute, sigmas, predictor, gram))


def _gram_at(profile: CacheProfile, sigmas: Sequence[float]) -> np.ndarray:
    assert profile.gram is not None and profile.sigmas is not None
    return resample_gram(np.asarray(profile.gram), profile.sigmas, sigmas)
