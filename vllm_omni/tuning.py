"""Steps and weights of a budget by where they lead: how far the end of the run is from the uncached one.

Plans that the planner holds for nearly as good end a decibel or two apart, so that a few of each number of full
forwards are run, and the nearest is tuned. The planner lets the errors of all skipped steps cancel where the run ends,
by what it expects the rest of the run to make of each; here that is measured, with all other skips as they are. To
first order the end moves by a sum over the weights: for each of them a run is made in which it is moved a little, and
one least squares problem gives all of them at once, a Gauss-Newton step from the planner's own. The weights of a step
go on to sum to what they did.

Solvers whose weights are fitted to the end of a run are known for whole steps (bespoke non-stationary solvers, Shaul et
al., ICML 2024); here they are those of cached forecasts, and a few prompts and no gradient are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vllm_omni.diffusion.cache.plan.compose import MAX_COHERENT_STEPS, CachePlan
from vllm_omni.diffusion.cache.plan.planner import ORDER
from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.schedule import Schedule, Switches
from vllm_omni.diffusion.cache.profile import CacheProfile, MeasuredBudget
from vllm_omni.trials import Away, Measurement, Trial, planned, plans

MOVED = 0.1  # by how much a trial moves a weight
RIDGES = (0.1, 0.3, 1.0, 3.0)  # of each step's own part of the normal equations
MOST_PROMPTS = 8  # that give weights; with four the mean is as good, and single pictures are not (docs/log.md)
ROUNDS = 4  # of weighing prompts by what is left of their error


class Shift(NamedTuple):
    """Weight of one step's forecast that goes from one anchor to another."""

    step: int
    source: int
    target: int


class Chosen(NamedTuple):
    """The plan of one budget that ended nearest, and by prompt its decibels, and those of what the others choose."""

    plan: CachePlan
    is_planners_own: bool  # which it finds again
    decibels: np.ndarray
    by_others: np.ndarray

    @classmethod
    def of(cls, plans: Sequence[CachePlan], table: np.ndarray) -> Chosen:
        """From the decibels (prompts, plans) of a budget's plans, the planner's own first."""
        sums = table.sum(axis=0)
        best = int(sums.argmax())
        others = (sums - table).argmax(axis=1) if len(table) > 1 else [best]
        return cls(plans[best], best == 0, table[:, best], table[np.arange(len(table)), others])


def tuned_weights(profile: CacheProfile, prompts: int, first: int = 0) -> Measurement[CacheProfile]:
    """`profile` with budgets, each with the steps and weights that runs of it have chosen; see `MeasuredBudget`.

    Of plans that the planner holds for nearly as good, the one that ends nearest is tuned, in the mean of the prompts
    from `first` on. Up to eight of them give the weights, and all say what they are worth, each with weights that it
    has not given: they are left if decibels fall by more than a standard error, for they rarely do and so few prompts
    say little (docs/log.md). The published rule is taken if it is nearer, by as much, than the plan that the other
    prompts choose. One prompt alone is fitted, not measured: it chooses no plan and gives no weights. Nor are runs
    tuned that have more steps than are planned at once.
    """
    switches, those = profile.schedule.switches, range(first, first + prompts)
    fitted = prompts > 1 and profile.schedule.steps <= MAX_COHERENT_STEPS
    good = [
        [own, *(_shifted(other, switches, {}) for other in others if fitted)] for own, *others in plans(profile)
    ]  # rounded, as budgets hold them

    def read(results: Sequence[Away]) -> Measurement[CacheProfile]:
        table = np.array([result.decibels for result in results]).reshape(prompts, -1)
        ends = np.cumsum([0, *map(len, good)])
        chosen = [Chosen.of(own, table[:, a:b]) for own, (a, b) in zip(good, pairwise(ends), strict=True)]
        return _tuned(profile, chosen, those) if fitted else _compared(profile, chosen, [[] for _ in chosen], those)

    trials = tuple(Trial(prompt, _always(plan), picture=True) for prompt in those for own in good for plan in own)
    return Measurement("plans", trials, read)


def _tuned(profile: CacheProfile, chosen: Sequence[Chosen], prompts: Sequence[int]) -> Measurement[CacheProfile]:
    """`profile` with budgets of the chosen plans, their weights tuned."""
    switches, giving = profile.schedule.switches, prompts[:MOST_PROMPTS]
    shifts = [_shifts(_widened(own.plan, switches)) for own in chosen]

    def read(results: Sequence[Away]) -> Measurement[CacheProfile]:
        rows = iter(results)
        runs = [[[next(rows) for _ in range(1 + len(own))] for own in shifts] for _ in giving]
        tuned = []
        for index, (before, own) in enumerate(zip(chosen, shifts, strict=True)):
            found = amounts_of([prompt[index] for prompt in runs], [shift.step for shift in own])
            tuned.append([_shifted(before.plan, switches, dict(zip(own, one, strict=True))) for one in found])
        return _compared(profile, chosen, tuned, prompts)

    trials = tuple(
        Trial(prompt, _always(_shifted(before.plan, switches, {} if shift is None else {shift: MOVED})), kept=True)
        for prompt in giving
        for before, own in zip(chosen, shifts, strict=True)
        for shift in (None, *own)
    )
    return Measurement("weights", trials, read)


def _always(plan: CachePlan) -> Callable[[Schedule], CachePlan]:
    return lambda schedule: plan


def _compared(
    profile: CacheProfile, chosen: Sequence[Chosen], tuned: Sequence[Sequence[CachePlan]], prompts: Sequence[int]
) -> Measurement[CacheProfile]:
    """`profile` with the nearest for each budget: tuned, unless that is farther than as chosen, or the published rule.

    `tuned`: for each budget those without each of the first prompts, then that of all of them; empty if there is none.
    Of what the planner finds by itself nothing is kept.
    """
    ways = [own or [before.plan] for before, own in zip(chosen, tuned, strict=True)]
    by_rule = [planned(profile.curve_alone(), own.plan.full_forwards)(profile.schedule) for own in chosen]

    def read(results: Sequence[Away]) -> CacheProfile:
        table = np.array([result.decibels for result in results]).reshape(len(prompts), len(chosen), 2)
        gone = np.array([result.gone for result in results]).reshape(table.shape)[..., 0]
        budgets = []
        for index, own in enumerate(chosen):
            moved, rule = table[:, index].T
            gained = moved - own.decibels
            left = not tuned[index] or gone[:, index].any() or _lost(gained)
            ruled = _lost(own.by_others - rule + (0.0 if left else gained))
            plan = own.plan if left else tuned[index][-1]
            terms = {} if ruled or (left and own.is_planners_own) else plan.terms
            speedup = len(profile.ratios) / plan.full_forwards
            budgets.append(MeasuredBudget(speedup=speedup, terms=terms, by_rule=ruled))
        return profile.model_copy(update={"budgets": tuple(budgets)})

    trials = tuple(
        Trial(prompt, _always(plan), picture=True)
        for number, prompt in enumerate(prompts)
        for moved, rule in zip(ways, by_rule, strict=True)
        for plan in (moved[min(number, len(moved) - 1)], rule)
    )
    return Measurement("weights, compared", trials, read)


def _lost(decibels: np.ndarray) -> bool:
    """Whether prompts lost by more than a standard error, one alone at all; `decibels` by how much each is nearer."""
    spread = decibels.std(ddof=1) if len(decibels) > 1 else 0.0
    return bool(decibels.mean() < -spread / np.sqrt(len(decibels)))


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
    terms: dict[int, Terms] = {}
    for step, own in weights.items():
        rounded = [(anchor, float(f"{weight:.6g}")) for anchor, weight in own.items()]
        terms[step] = tuple(term for term in rounded if term[1]) or (rounded[-1],)
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
    ends[:, 1:] = (ends[:, 1:] - ends[:, :1]) / MOVED
    products = ends @ ends.transpose(0, 2, 1)
    others = [np.arange(len(runs)) != out for out in range(len(runs))]
    left_out = {ridge: [solve(products[rest], steps, ridge) for rest in others] for ridge in RIDGES}

    def left(ridge: float) -> float:
        sizes = [_sizes(products[out : out + 1], amounts)[0] for out, amounts in enumerate(left_out[ridge])]
        return float(np.mean(np.log(sizes)))

    best = min(RIDGES, key=left)
    return [*left_out[best], solve(products, steps, best)]


def solve(products: np.ndarray, steps: Sequence[int], ridge: float) -> np.ndarray:
    """The amounts x (shifts,) with the least mean over prompts of log ||d + sum_i x_i d_i||^2, up to the ridge.

    `products` (prompts, 1 + shifts, 1 + shifts) are the inner products of d, where the plan ends, and of the d_i, what
    each shift adds to that. Reweighted least squares: a prompt counts by one over what is left of its error.
    """
    of_step = np.asarray(steps)
    same = of_step[:, None] == of_step
    amounts = np.zeros(len(of_step))
    for _ in range(ROUNDS):
        counts = 1 / _sizes(products, amounts)
        mean = np.tensordot(counts / counts.sum(), products, axes=1)
        normal, cross = mean[1:, 1:], mean[1:, 0]
        floor = 1e-9 * max(np.trace(normal) / len(normal), np.finfo(float).tiny / 1e-9) * np.eye(len(normal))
        amounts = -np.linalg.solve(normal * (1 + ridge * same) + floor, cross)
    return amounts


def _sizes(products: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """||d + sum_i x_i d_i||^2 of each prompt."""
    x = np.concatenate([[1.0], amounts])
    return np.maximum(np.einsum("i,pij,j->p", x, products, x), 1e-30)
