"""Weights of a budget's forecasts by where they lead: how far the end of the run is from the uncached one.

Least squares lets each forecast err least at its own step. What a user sees is the end of the run, where the errors of
all skipped steps add up, each as the steps after it have changed it, and where they can cancel. To first order that end
moves by a sum over the weights. So for each weight a run is made in which it is moved a little, with all other skips as
they are, and one least squares problem gives all of them at once: a Gauss-Newton step from the weights that the budget
has. The weights of a step go on to sum to what they did.

Solvers whose weights are fitted to the end of a run are known for whole steps (bespoke non-stationary solvers, Shaul et
al., ICML 2024); here they are those of cached forecasts, and a few prompts and no gradient are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.schedule import Schedule, Switches
from vllm_omni.diffusion.cache.profile import CacheProfile, MeasuredBudget
from vllm_omni.trials import Away, Measurement, Trial, plan_of

ORDER = 3  # computed steps that a forecast is made of
MOVED = 0.1  # by how much a trial moves a weight
RIDGES = (0.1, 0.3, 1.0, 3.0)  # of each step's own part of the normal equations
MOST_PROMPTS = 8  # that give weights; with four the mean is as good, and single pictures are not (docs/log.md)
ROUNDS = 4  # of weighing prompts by what is left of their error


class Shift(NamedTuple):
    """Weight of one step's forecast that goes from one anchor to another."""

    step: int
    source: int
    target: int


def tuning(profile: CacheProfile, prompts: int, first: int = 0, switches: Switches = ()) -> Measurement[CacheProfile]:
    """`profile` with the terms of each budget that end nearer than its predictor's own; see `MeasuredBudget`.

    The prompts from `first` on give the weights, up to eight of them, and all say what they are worth, each with
    weights that it has not given: they are left if decibels fall by more than a standard error, for they rarely do and
    so few prompts say little (docs/log.md). One prompt alone is fitted, not measured: it gives none.
    """
    assert profile.sigmas is not None
    schedule = Schedule(len(profile.ratios), profile.sigmas, switches)
    untuned = [budget.model_copy(update={"terms": {}}) for budget in profile.budgets]
    plans = [plan_of(profile, budget) for budget in untuned]
    shifts = [_shifts(_widened(plan(schedule), switches)) for plan in plans]
    giving = min(MOST_PROMPTS, prompts) if prompts > 1 else 0

    def with_shift(plan: Callable[[Schedule], CachePlan], shift: Shift | None) -> Callable[[Schedule], CachePlan]:
        own = {} if shift is None else {shift: MOVED}
        return lambda real: _shifted(plan(real), switches, own)

    def read(results: Sequence[Away]) -> Measurement[CacheProfile]:
        rows = iter(results)
        runs = [[[next(rows) for _ in range(1 + len(own))] for own in shifts] for _ in range(giving)]
        tuned = []
        for index, (budget, own) in enumerate(zip(untuned, shifts, strict=True)):
            found = amounts_of([prompt[index] for prompt in runs], [shift.step for shift in own])
            plan = plans[index](schedule)
            terms = [_shifted(plan, switches, dict(zip(own, amounts, strict=True))).terms for amounts in found]
            tuned.append([budget.model_copy(update={"terms": one}) for one in terms])
        return _compared(profile, untuned, tuned, range(first, first + prompts))

    trials = tuple(
        Trial(first + prompt, with_shift(plan, shift), kept=True)
        for prompt in range(giving)
        for plan, own in zip(plans, shifts, strict=True)
        for shift in (None, *own)
    )
    return Measurement("weights", trials, read)


def _compared(
    profile: CacheProfile,
    untuned: Sequence[MeasuredBudget],
    tuned: Sequence[Sequence[MeasuredBudget]],
    prompts: Sequence[int],
) -> Measurement[CacheProfile]:
    """`profile` with the budgets of `tuned` that are not farther than those of `untuned`; none of its figures holds.

    `tuned`: for each budget those without each of the first prompts, then that of all of them; empty if there is none.
    """
    tried = [index for index, ways in enumerate(tuned) if ways]

    def read(results: Sequence[Away]) -> CacheProfile:
        table = np.array([result.decibels for result in results]).reshape(len(prompts), len(tried), 2)
        gained = dict(zip(tried, np.diff(table)[..., 0].T, strict=True))
        budgets = [budget if _lost(gained.get(i)) else tuned[i][-1] for i, budget in enumerate(untuned)]
        return profile.model_copy(update={"budgets": tuple(budget.without_figures() for budget in budgets)})

    trials = tuple(
        Trial(prompt, plan_of(profile, one), picture=True)
        for number, prompt in enumerate(prompts)
        for index in tried
        for one in (untuned[index], tuned[index][min(number, len(tuned[index]) - 1)])
    )
    return Measurement("weights, compared", trials, read)


def _lost(decibels: np.ndarray | None) -> bool:
    """Whether prompts lost by more than a standard error, or there were none."""
    return decibels is None or bool(decibels.mean() < -decibels.std(ddof=1) / np.sqrt(len(decibels)))


def _widened(plan: CachePlan, switches: Switches) -> dict[int, Terms]:
    """The plan's terms, each with the last computed steps of its denoiser, some with a weight of zero."""
    terms: dict[int, Terms] = {}
    computed: list[int] = []
    for step, compute in enumerate(plan.compute):
        computed = [] if step in switches else computed
        if compute:
            computed.append(step)
        else:
            own = dict(plan.terms.get(step, ()))
            anchors = sorted({*computed[-ORDER:], *own})
            terms[step] = tuple((anchor, own.get(anchor, 0.0)) for anchor in anchors)
    return terms


def _shifts(terms: dict[int, Terms]) -> list[Shift]:
    """Every way to move weight from a step's last anchor to another."""
    return [Shift(step, own[-1][0], anchor) for step, own in terms.items() for anchor, _ in own[:-1]]


def _shifted(plan: CachePlan, switches: Switches, amounts: Mapping[Shift, float]) -> CachePlan:
    """The plan with so much weight moved along each shift."""
    weights = {step: dict(own) for step, own in _widened(plan, switches).items()}
    for shift, amount in amounts.items():
        weights[shift.step][shift.source] -= amount
        weights[shift.step][shift.target] += amount
    terms = {
        step: tuple((anchor, float(f"{weight:.6g}")) for anchor, weight in own.items() if weight)
        for step, own in weights.items()
    }
    return CachePlan.of(plan.compute, terms, plan.forecasts)


def amounts_of(runs: Sequence[Sequence[Away]], steps: Sequence[int]) -> list[np.ndarray]:
    """How much to move along each shift: without each prompt, in order, and then by all; nothing without numbers.

    `runs`, by prompt: as planned, then with each shift; `steps`: that of each shift. Each step's own part of the normal
    equations is enlarged, so that steps do not lean on one another for what a few prompts show by chance: as much as
    serves prompts best that are left out, one after another.
    """
    moved = [run.moved for prompt in runs for run in prompt]
    if len(runs) < 2 or not steps or any(one is None or not np.isfinite(one).all() for one in moved):
        return []
    ends = np.asarray(moved, dtype=np.float64).reshape(len(runs), 1 + len(steps), -1)
    away, by = ends[:, 0], (ends[:, 1:] - ends[:, :1]) / MOVED
    others = [np.arange(len(runs)) != out for out in range(len(runs))]
    left_out = {ridge: [solve(away[rest], by[rest], steps, ridge) for rest in others] for ridge in RIDGES}

    def left(ridge: float) -> float:
        ends = away + np.einsum("pk,pkn->pn", left_out[ridge], by)
        return float(np.mean(np.log(np.maximum(_sizes(ends), 1e-30))))

    best = min(RIDGES, key=left)
    return [*left_out[best], solve(away, by, steps, best)]


def solve(away: np.ndarray, by: np.ndarray, steps: Sequence[int], ridge: float) -> np.ndarray:
    """The amounts x (shifts,) with the least mean over prompts of log ||away + x by||^2, up to the ridge.

    `away` (prompts, numbers) is where the plan ends, `by` (prompts, shifts, numbers) where each shift moves that.
    Reweighted least squares: a prompt counts by one over what is left of its error.
    """
    of_step = np.asarray(steps)
    same = of_step[:, None] == of_step
    products, cross = by @ by.transpose(0, 2, 1), np.einsum("pkn,pn->pk", by, away)
    amounts = np.zeros(len(of_step))
    for _ in range(ROUNDS):
        counts = 1 / np.maximum(_sizes(away + amounts @ by), 1e-30)
        counts /= counts.sum()
        normal = np.tensordot(counts, products, axes=1)
        floor = 1e-9 * max(np.trace(normal) / len(normal), np.finfo(float).tiny / 1e-9) * np.eye(len(normal))
        amounts = -np.linalg.solve(normal * (1 + ridge * same) + floor, counts @ cross)
    return amounts


def _sizes(rows: np.ndarray) -> np.ndarray:
    return np.einsum("pn,pn->p", rows, rows)
