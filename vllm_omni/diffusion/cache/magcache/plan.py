"""From settings, a curve and a schedule to one request's plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vllm_omni.diffusion.cache.curve import resample
from vllm_omni.diffusion.cache.plan import Plan, magcache_plan, mask_plan
from vllm_omni.diffusion.cache.planner import best_plan, curve_costs, gram_costs
from vllm_omni.diffusion.cache.predictor import NEED_GRAM, Terms, forecasts, resample_gram
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.request_cache import CachePlan
from vllm_omni.diffusion.cache.segments import Switches, confine, forced_steps, segments
from vllm_omni.diffusion.data import PROMISES, DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError

MAX_PAIR_STEPS = 100  # beyond, plans come from the curve: pairs take steps^3 time, in the engine's loop
MAX_PLANNED_STEPS = 1000
SPEEDUPS = {"high": 1.5, "balanced": 2.0, "fast": 3.0}


def choose_predictor(config: DiffusionCacheConfig, profile: CacheProfile | None, forwards: int | None = None) -> str:
    """`auto` is what calibration found best for this checkpoint with so many full forwards, else reuse, which every
    curve allows.

    Forwards, not steps per forward, set how far apart in sigma the anchors are, whatever the step count.
    """
    has_gram = profile is not None and profile.gram is not None
    if config.predictor == "auto":
        return (profile.predictor_at(forwards) if profile is not None else None) or "reuse"
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
    switches: Switches = (),
) -> CachePlan:
    """The whole run, decided before its first step; InvalidValueError for a promise that cannot be kept.

    Each denoiser's segment is planned as a run of its own; a promise is for all of them together.
    """
    if ratios is None and config.steps_mask is None:
        raise InvalidValueError("mag_ratios", None, "must be given where no steps_mask is and no curve is known")
    curve = resample(ratios, steps, config.curve_resampling) if ratios is not None else None
    gram = _gram_at(profile, sigmas)
    if config.steps_mask is not None:
        masked = mask_plan(config.steps_mask, steps, config.compute_last_step)
        compute = tuple(flag or step in switches for step, flag in enumerate(masked))
    elif (
        nfe := promised_forwards(config, steps, switches) or preset_forwards(config, profile, steps, switches)
    ) is not None:
        assert curve is not None
        predictor = choose_predictor(config, profile, nfe)
        compute = best_plan(_costs(curve, gram, sigmas, predictor, switches), nfe, config.compute_last_step)
    else:
        assert curve is not None
        measured = profile.branches.values() if profile is not None and ratios == profile.ratios else ()
        curves = [resample(branch, steps, config.curve_resampling) for branch in measured] or [curve]
        compute = _by_rule(curves, config, segments(steps, switches))
    predictor = choose_predictor(config, profile, sum(compute))
    if gram is None and curve is not None and predictor == "gamma":  # it looks at magnitudes alone
        gram = np.diag(np.cumprod(curve) ** 2)
    terms: dict[int, Terms] = {}
    for part in segments(steps, switches):
        own = forecasts(compute[part], sigmas[part], predictor, None if gram is None else gram[part, part])
        terms |= {part.start + t: tuple((part.start + anchor, w) for anchor, w in own[t]) for t in own}
    return CachePlan.of(compute, terms)


def _by_rule(curves: Sequence[tuple[float, ...]], config: DiffusionCacheConfig, parts: Sequence[slice]) -> Plan:
    """The threshold rule, begun anew in each segment, as the published Wan 2.2 text-to-video runs begin it."""
    plan: Plan = ()
    for part in parts:
        first, *others = [curve[part] for curve in curves]
        guarded = config.compute_last_step and part is parts[-1]
        plan += magcache_plan(
            first, config.mag_threshold, config.mag_max_skip_steps, config.mag_retention_ratio, guarded, others
        )
    return plan


def _costs(
    curve: Sequence[float], gram: np.ndarray | None, sigmas: Sequence[float], predictor: str, switches: Switches
) -> np.ndarray:
    def from_step(step: int) -> np.ndarray:
        if gram is not None and len(sigmas) <= MAX_PAIR_STEPS:
            return gram_costs(gram[step:, step:], sigmas[step:], predictor)
        return curve_costs(curve[step:], sigmas[step:])

    return confine(from_step(0), switches, from_step)


def promised_forwards(config: DiffusionCacheConfig, steps: int, switches: Switches = ()) -> int | None:
    """The full forwards that `config` promises of `steps`: `nfe`, or round(steps / speedup); None without a promise.

    A promise is kept or refused, never clamped: InvalidValueError names the nearest that can be kept.
    """
    if config.promise and steps > MAX_PLANNED_STEPS:
        raise InvalidValueError(
            "num_inference_steps", steps, f"must be at most {MAX_PLANNED_STEPS} with a promise ({', '.join(PROMISES)})"
        )
    least = len(forced_steps(steps, config.compute_last_step, switches))
    if config.nfe is not None:
        if not least <= config.nfe <= steps:
            near = min(max(config.nfe, least), steps)
            of = f"{steps} steps of {len(switches) + 1} denoisers" if switches else f"{steps} steps"
            raise InvalidValueError(
                "nfe", config.nfe, f"must be between {least} and {steps} for {of} (nearest: {near})"
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


def preset_forwards(
    config: DiffusionCacheConfig, profile: CacheProfile | None, steps: int, switches: Switches = ()
) -> int | None:
    """The full forwards of a preset where the profile has a Gram matrix to plan with; None: the threshold rule.

    "auto" is what calibration measured: `profile.forwards` of the profile's own steps, in proportion where there are
    more, but never fewer than those; "balanced" where it was not measured.
    """
    if config.preset in (None, "paper") or profile is None or profile.gram is None or steps > MAX_PLANNED_STEPS:
        return None
    least = len(forced_steps(steps, config.compute_last_step, switches))
    if config.preset == "auto" and profile.forwards is not None:
        wanted = max(profile.forwards, round(steps * profile.forwards / len(profile.ratios)))
    else:
        wanted = round(steps / SPEEDUPS.get(config.preset, SPEEDUPS["balanced"]))
    return min(max(wanted, least), steps)


def _gram_at(profile: CacheProfile | None, sigmas: Sequence[float]) -> np.ndarray | None:
    if profile is None or profile.gram is None or profile.sigmas is None:
        return None
    return resample_gram(np.asarray(profile.gram), profile.sigmas, sigmas)
