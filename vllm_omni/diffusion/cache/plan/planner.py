"""Which steps compute, and the weights of all others at once, so that their errors cancel where the run ends. Pure.

A skipped step t gets sum_j w_j o_j of computed ones before it, and errs by e_t. What is seen is where all of them end:
e_t moves the final latents by c_t J_t e_t. c_t = g_t |sigma_t - sigma_(t+1)| is how far a wrong velocity moves the
latents, times the gain, which says what has become of that at the end. A model that has learnt its pictures by heart
forgets early errors, one that makes pictures it has not seen lets them grow; so gains are measured, never assumed. J_t
is what the rest of the run makes of a direction. Of steps near one another it makes the same: displacements of steps up
to a seventh of the run apart are as parallel as the errors themselves, of steps more than a third apart they are not
(measured on the judges, docs/log.md). So the expected square of where the run ends is taken to be

    sum over t, u of k(t - u) c_t c_u <e_t, e_u>,    k(d) = exp(-d^2 / 2 l^2), and a little more at d = 0,

with every inner product from the Gram matrix. It is a square in the weights, each step's of which sum to one: one least
squares problem gives them all.

Prior art: shortest paths over cached steps (LeMiCa, NeurIPS 2025; DPCache, arXiv 2602.22654) with costs measured by
running the model along every edge; SenCache's local output sensitivity (arXiv 2602.24208); weights learnt by gradient
descent for one schedule (L2P, arXiv 2604.26365). There each step's error is paid for on its own.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np

from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.rule import Plan
from vllm_omni.diffusion.cache.plan.schedule import Switches

COHERENT = "coherent"
ORDER = 3  # computed steps that a forecast is made of
LENGTH = 0.4  # of the run: l
OWN = 0.1  # what k(0) has more than 1: each step's error has a part that no other's cancels
RESTARTS, AWAY, FARTHEST = 20, 3, 4  # of a search; moves from the best so far to each; steps that a move goes
MOST, WORK = 1_000, 5_000_000  # plans that it tries; times the square of their unknowns: a tenth of a second
GOOD, NEARLY = 6, 1.5  # plans that a search gives at most; times the cheapest one's cost
NOISE = 1e-5  # of each step's energy: what no other step shares, or is an error of the matrix


def step_weights(sigmas: Sequence[float], gains: np.ndarray | None = None) -> np.ndarray:
    """g_t |sigma_t - sigma_(t+1)|: what an error of one in step t's output moves the final latents by.

    A scheduler of second order (Heun's) stands still at every other call, with which it corrects the step before: the
    final latents move by the mean of both, so that each has half.
    """
    moved = np.abs(np.diff([*sigmas, 0.0]))
    corrects = np.flatnonzero(moved[1:] == 0.0) + 1
    moved[corrects] = moved[corrects - 1] = moved[corrects - 1] / 2
    return moved if gains is None else moved * gains


def coherence(weights: np.ndarray) -> np.ndarray:
    """k(t - u) c_t c_u, of shape (steps, steps); `weights` are c_t of every step."""
    step = np.arange(len(weights))
    alike = np.exp(-(((step[:, None] - step) / (LENGTH * len(step))) ** 2) / 2) + OWN * np.eye(len(step))
    return alike * np.outer(weights, weights)


def coherent_terms(compute: Plan, gram: np.ndarray, weights: np.ndarray, switches: Switches = ()) -> dict[int, Terms]:
    """The terms (anchor, weight) of every skipped step."""
    problem = _Problem(compute, switches)
    shifts = problem.solved(gram, coherence(weights))[0].tolist()
    terms = {step: {anchor: 0.0 for anchor in anchors} | {anchors[-1]: 1.0} for step, anchors in problem.anchors}
    for step, source, target, shift in zip(problem.steps, problem.sources, problem.targets, shifts, strict=False):
        terms[step][source] -= shift
        terms[step][target] += shift
    return {step: tuple((anchor, weight) for anchor, weight in own.items() if weight) for step, own in terms.items()}


def coherent_cost(compute: Plan, gram: np.ndarray, covariance: np.ndarray, switches: Switches = ()) -> float:
    """The expected square of where a run ends with these computed steps; `covariance` is that of `coherence`."""
    return _Problem(compute, switches).solved(gram, covariance)[1]


def best_plans(
    nfe: int, gram: np.ndarray, weights: np.ndarray, forced: Collection[int], switches: Switches = ()
) -> tuple[Plan, ...]:
    """The cheapest plan found with `nfe` computed steps, `forced` ones among them, and others nearly as cheap.

    No two differ by one step moved by one alone. Iterated local search (Lourenco, Martin and Stuetzle 2003): the first
    move of one computed step that costs less is made until none does, then on from some moves away from the best so
    far. No slower for longer runs; the same arguments give the same plans.
    """
    covariance, draw = coherence(weights), random.Random(nfe)
    most = min(MOST, WORK // (ORDER * (len(weights) - nfe) + 1) ** 2)
    known: dict[Plan, float] = {}

    def cost(plan: Plan) -> float:
        if plan not in known:
            known[plan] = coherent_cost(plan, gram, covariance, switches)
        return known[plan]

    def descended(plan: Plan) -> Plan:
        while len(known) < most:
            moves = _moves(plan, forced)
            draw.shuffle(moves)
            cheaper = (moved for moved in moves if len(known) < most and cost(moved) < cost(plan) * (1 - 1e-6))
            if (moved := next(cheaper, None)) is None:
                break
            plan = moved
        return plan

    best = descended(_spread(nfe, gram, weights, forced))
    for _ in range(RESTARTS):
        plan = best
        for _ in range(AWAY):
            plan = draw.choice(_moves(plan, forced) or [plan])
        best = min(best, descended(plan), key=cost)
    plans = [best]
    for plan in sorted((near for near in known if cost(near) <= NEARLY * cost(best)), key=cost):
        apart = (np.abs(np.flatnonzero(plan) - np.flatnonzero(other)).sum() for other in plans)
        if len(plans) < GOOD and min(apart) > 1:
            plans.append(plan)
    return tuple(plans)


def _spread(nfe: int, gram: np.ndarray, weights: np.ndarray, forced: Collection[int]) -> Plan:
    """The forced steps, and others where equal shares of the run have passed, by the root of how far it has moved."""
    own = np.diag(gram)
    apart = np.sqrt(np.maximum(own[1:] + own[:-1] - 2 * np.diag(gram, 1), 0.0))
    passed = np.cumsum([0.0, *np.sqrt(weights[1:] * apart)])
    computed = set(forced)
    for share in np.linspace(0.0, passed[-1], nfe - len(forced) + 2)[1:-1]:
        free = [step for step in range(len(weights)) if step not in computed]
        computed.add(min(free, key=lambda step: abs(passed[step] - share)))
    return tuple(step in computed for step in range(len(weights)))


def _moves(plan: Plan, forced: Collection[int]) -> list[Plan]:
    """The plans in which one computed step is another, up to four away."""
    moves = []
    for step in np.flatnonzero(plan).tolist():
        for other in range(max(step - FARTHEST, 1), min(step + FARTHEST + 1, len(plan))):
            if step not in forced and not plan[other]:
                flags = list(plan)
                flags[step], flags[other] = False, True
                moves.append(tuple(flags))
    return moves


class _Problem:
    """The least squares problem of one mask: which weight may go from which anchor to which, at which step.

    Columns are differences of two steps' outputs: o_target - o_source of each shift, then each step's error with its
    last anchor alone, o_last - o_t.
    """

    def __init__(self, compute: Plan, switches: Switches) -> None:
        self.anchors: list[tuple[int, list[int]]] = []
        for begin, end in pairwise((0, *switches, len(compute))):
            computed: list[int] = []
            for step in range(begin, end):
                if compute[step]:
                    computed.append(step)
                else:
                    self.anchors.append((step, computed[-ORDER:]))
        shifts = [(step, own[-1], anchor) for step, own in self.anchors for anchor in own[:-1]]
        self.shifts = len(shifts)
        errors = [(step, step, own[-1]) for step, own in self.anchors]
        self.steps, self.sources, self.targets = np.array(shifts + errors, dtype=int).reshape(-1, 3).T

    def solved(self, gram: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, float]:
        """(how much weight goes along each shift, the cost then)."""
        gram = gram + NOISE * np.diag(np.diag(gram))
        from_target, from_source = gram[self.targets], gram[self.sources]
        products = from_target[:, self.targets] - from_target[:, self.sources]
        products += from_source[:, self.sources] - from_source[:, self.targets]
        products *= covariance[np.ix_(self.steps, self.steps)]
        normal, cross = products[: self.shifts, : self.shifts], products[: self.shifts, self.shifts :].sum(axis=1)
        alone = float(products[self.shifts :, self.shifts :].sum())
        floor = max(1e-9 * np.trace(normal) / max(self.shifts, 1), np.finfo(float).tiny)
        amounts = -np.linalg.solve(normal + floor * np.eye(self.shifts), cross)
        return amounts, max(alone + float(amounts @ cross), 0.0)
