"""From settings, a checkpoint's profile and a schedule to one request's plan. Pure; the one place that decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from vllm_omni.diffusion.cache.plan.curve import resample
from vllm_omni.diffusion.cache.plan.planner import COHERENT, best_plans, coherent_terms, step_weights
from vllm_omni.diffusion.cache.plan.predictors import NEED_GRAM, Terms, forecasts, resample_gains, resample_gram
from vllm_omni.diffusion.cache.plan.rule import Plan, magcache_plan, mask_plan, rule_with
from vllm_omni.diffusion.cache.plan.schedule import Schedule, forced_steps
from vllm_omni.diffusion.cache.profile import CacheProfile, Forecasted
from vllm_omni.diffusion.cache.settings import BUDGETS, Budget, CacheSettings, Mask, Preset, Rule
from vllm_omni.errors import InvalidValueError

RULE = "rule"  # the published one, mask and reuse
TUNED = "tuned"  # what runs of this very schedule have chosen, steps and weights
MAX_COHERENT_STEPS = 100  # beyond, plans are the rule's: least squares over a whole run takes steps^3 time
MAX_PLANNED_STEPS = 1000


@dataclass(frozen=True)
class CachePlan:
    """What a request will do at each step, known before its first: compute or forecast, and what it keeps for that.

    It forecasts what the blocks add, so that embedding and head still run, or the denoiser's whole output.
    """

    compute: Plan
    terms: dict[int, Terms]
    needed_after: tuple[frozenset[int], ...]
    forecasts: Forecasted
    predictor: str = ""  # whose weights these are

    @classmethod
    def of(
        cls, compute: Plan, terms: dict[int, Terms], forecasts: Forecasted = "residual", predictor: str = ""
    ) -> CachePlan:
        needed: list[frozenset[int]] = []
        later: frozenset[int] = frozenset()
        for step in range(len(compute) - 1, -1, -1):
            needed.append(later)
            later |= {anchor for anchor, _ in terms.get(step, ())}
        return cls(compute, terms, tuple(reversed(needed)), forecasts, predictor)

    @property
    def full_forwards(self) -> int:
        return sum(self.compute)


@lru_cache(maxsize=256)
def compose(
    settings: CacheSettings, ratios: tuple[float, ...] | None, profile: CacheProfile | None, schedule: Schedule
) -> CachePlan:
    """The whole run, decided before its first step; InvalidValueError for a budget that cannot be kept.

    No forecast crosses a switch of denoisers; a budget is for all of them together.
    """
    if (tuned := _tuned(settings, ratios, profile, schedule)) is not None:
        return tuned
    if ratios is None and not isinstance(settings.plan, Mask):
        raise InvalidValueError("mag_ratios", None, "must be given unless steps_mask is or a curve is known")
    nfe = full_forwards(settings, profile, schedule)
    predictor, what = choose_forecast(settings, profile, schedule.steps, nfe)
    compute = _compute_steps(settings, ratios, profile, schedule, nfe, what if predictor != RULE else None)
    gram = _gram_at(profile, schedule, what)
    if predictor == COHERENT and profile is not None and gram is not None:
        terms = coherent_terms(compute, gram, _weights_at(profile, schedule, what), schedule.switches)
        return CachePlan.of(compute, terms, what, predictor)
    predictor, terms = "reuse" if predictor == RULE else predictor, {}
    for part in schedule.segments:
        own = forecasts(compute[part], schedule.sigmas[part], predictor, None if gram is None else gram[part, part])
        terms |= {part.start + t: tuple((part.start + anchor, w) for anchor, w in own[t]) for t in own}
    return CachePlan.of(compute, terms, what, predictor)


def _tuned(
    settings: CacheSettings, ratios: tuple[float, ...] | None, profile: CacheProfile | None, schedule: Schedule
) -> CachePlan | None:
    """The plan that calibration has tuned for this very schedule and number of full forwards, if it has."""
    if profile is None or ratios != profile.ratios or not settings.config.as_measured or not profile.is_of(schedule):
        return None
    nfe, steps = full_forwards(settings, profile, schedule), schedule.steps
    terms = next((budget.terms for budget in profile.budgets if budget.forwards(steps) == nfe), None)
    if not terms:
        return None
    compute = tuple(step not in terms for step in range(steps))
    return CachePlan.of(compute, terms, profile.forecasts, TUNED)


def _compute_steps(
    settings: CacheSettings,
    ratios: tuple[float, ...] | None,
    profile: CacheProfile | None,
    schedule: Schedule,
    nfe: int | None,
    planned: Forecasted | None,
) -> Plan:
    """The computed steps, by the kind of plan; `planned`: forecasts of what, None if a budget is the rule's."""
    guarded = settings.config.compute_last_step
    if isinstance(settings.plan, Mask):
        masked = mask_plan(settings.plan.flags, schedule.steps, guarded)
        return tuple(flag or step in schedule.switches for step, flag in enumerate(masked))
    assert ratios is not None
    measured = profile.branches.values() if profile is not None and ratios == profile.ratios else ()
    curves = [_curve(settings, branch, schedule) for branch in measured or [ratios]]

    def plan_at(threshold: float, max_skip_steps: int, retention_ratio: float) -> Plan:
        return _by_rule(curves, Rule(threshold, max_skip_steps, retention_ratio), schedule, guarded)

    if nfe is None:
        return _by_rule(curves, rule_of(settings), schedule, guarded)
    if planned is None or profile is None or schedule.steps > MAX_COHERENT_STEPS or profile.gram_of(planned) is None:
        return rule_with(plan_at, schedule.steps, nfe)
    return good_plans(nfe, profile, planned, schedule, guarded)[0]


@lru_cache(maxsize=256)
def good_plans(nfe: int, profile: CacheProfile, what: Forecasted, schedule: Schedule, guarded: bool) -> Sequence[Plan]:
    """The planner's own, and others that it expects to be nearly as good: one search for every way to ask for them."""
    gram = _gram_at(profile, schedule, what)
    assert gram is not None
    forced = forced_steps(schedule.steps, guarded, schedule.switches)
    return best_plans(nfe, gram, _weights_at(profile, schedule, what), forced, schedule.switches)


def _curve(settings: CacheSettings, ratios: tuple[float, ...], schedule: Schedule) -> tuple[float, ...]:
    """A curve at the steps that are run: of an edit's, which begins in the middle of a schedule, the end."""
    return resample(ratios, schedule.left_out + schedule.steps, settings.config.curve_resampling)[schedule.left_out :]


def rule_of(settings: CacheSettings) -> Rule:
    """The threshold rule of settings that have no number of full forwards."""
    rule = settings.plan.rule if isinstance(settings.plan, Preset) else settings.plan
    assert isinstance(rule, Rule)
    return rule


def _by_rule(curves: Sequence[tuple[float, ...]], rule: Rule, schedule: Schedule, guarded: bool) -> Plan:
    """The threshold rule, begun anew in each segment, as the published Wan 2.2 text-to-video runs begin it."""
    plan: Plan = ()
    for part in schedule.segments:
        first, *others = [curve[part] for curve in curves]
        last = guarded and part.stop == schedule.steps
        plan += magcache_plan(first, rule.threshold, rule.max_skip_steps, rule.retention_ratio, last, others)
    return plan


def choose_forecast(
    settings: CacheSettings, profile: CacheProfile | None, steps: int = 1, nfe: int | None = None
) -> tuple[str, Forecasted]:
    """The predictor that is named, of residuals; `auto` is the weights of all steps at once, for a profile's matrix.

    Without one it is reuse, and the whole published rule for a budget of which that was measured to be nearer; beyond
    `MAX_COHERENT_STEPS` weights are found step by step.
    """
    asked = settings.config.predictor
    if asked == "auto":
        if profile is None or profile.gram_of(profile.forecasts) is None:
            return "reuse", "residual"
        best = None if nfe is None else profile.budget_at(max(1, round(nfe / steps * len(profile.ratios))))
        if best is not None and best.by_rule:
            return RULE, "residual"
        return COHERENT if steps <= MAX_COHERENT_STEPS else "affine", profile.forecasts
    if asked in NEED_GRAM and (profile is None or profile.gram is None):
        fix = "needs a calibrated profile of this checkpoint (vllm-omni calibrate)"
        raise InvalidValueError("predictor", asked, fix)
    return asked, "residual"


def full_forwards(settings: CacheSettings, profile: CacheProfile | None, schedule: Schedule) -> int | None:
    """How many full forwards the plan is to have; None if the threshold rule or a mask says which steps compute.

    A budget buys `nfe`, round(steps / speedup), or what keeps `psnr`. It is kept or refused, never clamped:
    InvalidValueError names the nearest that can be kept, or what the profile lacks. A preset is the rule, too, if the
    profile has no Gram matrix to plan with.
    """
    budget, steps, switches = settings.plan, schedule.steps, schedule.switches
    if not isinstance(budget, Budget | Preset):
        return None
    least = len(forced_steps(steps, settings.config.compute_last_step, switches))
    if isinstance(budget, Preset):
        if not budget.planned or profile is None or profile.gram is None or steps > MAX_PLANNED_STEPS:
            return None
        if profile.has_figures and settings.config.as_measured:
            return _forwards_keeping(budget.psnr, profile, schedule, least)
        return min(max(round(steps / budget.speedup), least), steps)
    if steps > MAX_PLANNED_STEPS:
        names = ", ".join(BUDGETS)
        raise InvalidValueError("num_inference_steps", steps, f"must be at most {MAX_PLANNED_STEPS} with {names}")
    if budget.nfe is not None:
        if not least <= budget.nfe <= steps:
            near = min(max(budget.nfe, least), steps)
            of = f"{steps} steps of {len(switches) + 1} denoisers" if switches else f"{steps} steps"
            fix = f"must be between {least} and {steps} for {of} (nearest: {near})"
            raise InvalidValueError("nfe", budget.nfe, fix)
        return budget.nfe
    if budget.psnr is not None:
        if profile is None or not profile.has_figures:
            fix = "needs a profile with figures of this checkpoint: vllm-omni calibrate MODEL --prompts FILE (10 lines)"
            raise InvalidValueError("psnr", budget.psnr, fix)
        return _forwards_keeping(budget.psnr, profile, schedule, least)
    if budget.speedup is None:
        raise InvalidValueError("seconds", budget.seconds, "needs the engine, which measures how long a forward takes")
    if (nfe := round(steps / budget.speedup)) < least:
        nearest = f"nearest: {steps / least:g}, {least} full forwards"
        raise InvalidValueError("speedup", budget.speedup, f"is out of reach in {steps} steps ({nearest})")
    return nfe


def _forwards_keeping(psnr: float, profile: CacheProfile, schedule: Schedule, least: int) -> int:
    """The fewest full forwards with which nine of ten outputs keep `psnr` dB; every step if none does.

    Measured on the profile's own steps, tuned weights there alone; in proportion if a run has more, but never fewer.
    """
    steps = schedule.steps
    if (speedup := profile.speedup_for(psnr, tuned=profile.is_of(schedule))) is None:
        return steps
    wanted = max(round(len(profile.ratios) / speedup), ceil(steps / speedup - 1e-6))
    return min(max(wanted, least), steps)


def expected_forwards(settings: CacheSettings, steps: int) -> int:
    """A guess at the full forwards of `steps` before the plan is made, for scheduling: a budget's, else every step."""
    budget = settings.plan
    if not isinstance(budget, Budget):
        return steps
    share = budget.nfe / steps if budget.nfe is not None else 1 / (budget.speedup or 1.0)
    return round(steps * min(1.0, share))


def _gram_at(profile: CacheProfile | None, schedule: Schedule, what: Forecasted) -> np.ndarray | None:
    if profile is None or profile.sigmas is None or (gram := profile.gram_of(what)) is None:
        return None
    measured = np.asarray(gram)
    return measured if profile.is_of(schedule) else resample_gram(measured, profile.sigmas, schedule.sigmas)


def _weights_at(profile: CacheProfile, schedule: Schedule, what: Forecasted) -> np.ndarray:
    """c_t of the planner; gains are equal where none were measured."""
    if profile.sigmas is None or (gains := profile.gains_of(what)) is None:
        return step_weights(schedule.sigmas)
    own = np.asarray(gains) if profile.is_of(schedule) else resample_gains(gains, profile.sigmas, schedule.sigmas)
    return step_weights(schedule.sigmas, own)
