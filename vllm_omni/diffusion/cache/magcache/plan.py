"""From settings, a curve and a schedule to one request's plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vllm_omni.diffusion.cache.curve import resample
from vllm_omni.diffusion.cache.plan import magcache_plan, mask_plan
from vllm_omni.diffusion.cache.planner import best_plan, curve_costs, fewest_forwards, gram_costs
from vllm_omni.diffusion.cache.predictor import NEED_GRAM, forecasts, resample_gram
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.request_cache import CachePlan
from vllm_omni.diffusion.data import PROMISES, DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError

MAX_PAIR_STEPS = 100  # beyond, plans come from the curve: pairs take steps^3 time, in the engine's loop
MAX_PLANNED_STEPS = 1000
SPEEDUPS = {"high": 1.5, "balanced": 2.0, "fast": 3.0}


def choose_predictor(config: DiffusionCacheConfig, profile: CacheProfile | None, speedup: float = 1.0) -> str:
    """`auto` is what calibration found best for this checkpoint at this speed-up (steps per full forward), otherwise
    reuse, which every curve allows."""
    has_gram = profile is not None and profile.gram is not None
    if config.predictor == "auto":
        return (profile.predictor_at(speedup) if profile is not None else None) or "reuse"
    if config.predictor in NEED_GRAM and not has_gram:
        raise InvalidValueError(
            "predictor", config.predictor, "needs a calibrated profile of this checkpoint (vllm-omni calibrate)"
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
    """The whole run, decided before its first step; InvalidValueError for a promise that cannot be kept."""
    if ratios is None and config.steps_mask is None:
        raise InvalidValueError("mag_ratios", None, "must be given where no steps_mask is and no curve is known")
    curve = resample(ratios, steps, config.curve_resampling) if ratios is not None else None
    gram = _gram_at(profile, sigmas)
    if config.steps_mask is not None:
        compute = mask_plan(config.steps_mask, steps, config.compute_last_step)
    elif (nfe := promised_forwards(config, steps) or preset_forwards(config, profile, steps)) is not None:
        assert curve is not None
        short = steps <= MAX_PAIR_STEPS
        predictor = choose_predictor(config, profile, steps / nfe)
        costs = gram_costs(gram, sigmas, predictor) if gram is not None and short else curve_costs(curve, sigmas)
        compute = best_plan(costs, nfe, config.compute_last_step)
    else:
        assert curve is not None
        measured = profile.branches.values() if profile is not None and ratios == profile.ratios else ()
        first, *others = [resample(branch, steps, config.curve_resampling) for branch in measured] or [curve]
        compute = magcache_plan(
            first,
            config.mag_threshold,
            config.mag_max_skip_steps,
            config.mag_retention_ratio,
            config.compute_last_step,
            others,
        )
    predictor = choose_predictor(config, profile, steps / sum(compute))
    if gram is None and curve is not None and predictor == "gamma":  # it looks at magnitudes alone
        gram = np.diag(np.cumprod(curve) ** 2)
    return CachePlan.of(compute, forecasts(compute, sigmas, predictor, gram))


def promised_forwards(config: DiffusionCacheConfig, steps: int) -> int | None:
    """The full forwards that `config` promises of `steps`: `nfe`, or round(steps / speedup); None without a promise.

    A promise is kept or refused, never clamped: InvalidValueError names the nearest that can be kept.
    """
    if config.promise and steps > MAX_PLANNED_STEPS:
        raise InvalidValueError(
            "num_inference_steps", steps, f"must be at most {MAX_PLANNED_STEPS} with a promise ({', '.join(PROMISES)})"
        )
    least = fewest_forwards(steps, config.compute_last_step)
    if config.nfe is not None:
        if not least <= config.nfe <= steps:
            near = min(max(config.nfe, least), steps)
            raise InvalidValueError(
                "nfe", config.nfe, f"must be between {least} and {steps} for {steps} steps (nearest: {near})"
            )
        return config.nfe
    if config.seconds is not None:
        raise InvalidValueError("seconds", config.seconds, "needs the engine, which measures how long a forward takes")
    if config.speedup is None:
        return None
    if (nfe := round(steps / config.speedup)) < least:
        nearest = f"nearest: {steps / least:g}, {least} full forwards"
        raise InvalidValueError("speedup", config.speedup, f"is out of reach in {steps} steps ({nearest})")
    return nfe


def preset_forwards(config: DiffusionCacheConfig, profile: CacheProfile | None, steps: int) -> int | None:
    """The full forwards of a preset where the profile has a Gram matrix to plan with; None: the threshold rule.

    "auto" is what calibration measured: `profile.forwards` of the profile's own steps, in proportion where there are
    more, but never fewer than those; "balanced" where it was not measured.
    """
    if config.preset in (None, "paper") or profile is None or profile.gram is None or steps > MAX_PLANNED_STEPS:
        return None
    least = fewest_forwards(steps, config.compute_last_step)
    if config.preset == "auto" and profile.forwards is not None:
        wanted = max(profile.forwards, round(steps * profile.forwards / len(profile.ratios)))
    else:
        wanted = round(steps / SPEEDUPS.get(config.preset, SPEEDUPS["balanced"]))
    return min(max(wanted, least), steps)


def _gram_at(profile: CacheProfile | None, sigmas: Sequence[float]) -> np.ndarray | None:
    if profile is None or profile.gram is None or profile.sigmas is None:
        return None
    return resample_gram(np.asarray(profile.gram), profile.sigmas, sigmas)
