"""Weights of all skipped steps at once, so that their errors cancel where the run ends, and masks for such weights.

Least squares step by step makes each forecast's error small where it is made. What is seen is where all of them end:
step t's error e_t moves the final latents by c_t J_t e_t, with c_t of `step_weights`, and J_t what the rest of the run
makes of a direction. Of steps near one another it makes the same: displacements of steps up to a seventh of the run
apart are as parallel as the errors themselves, those of steps more than a third apart are not (measured on the judges,
docs/log.md). So the expected square of where the run ends is taken to be

    sum over t, u of k(t - u) c_t c_u <e_t, e_u>,    k(d) = exp(-d^2 / 2 l^2), and a little more at d = 0,

with every inner product from the Gram matrix. It is a square in the weights, each step's of which sum to one: one least
squares problem gives them all. Where k is 1 everywhere this is numerical quadrature of the run from its computed steps.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from itertools import pairwise

import numpy as np

from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.rule import Plan
from vllm_omni.diffusion.cache.plan.schedule import Switches

COHERENT = "coherent"
ORDER = 3  # computed steps that a forecast is made of
LENGTH = 0.4  # of the run: l
OWN = 0.1  # what k(0) has more than 1: each step's error has a part that no other's cancels
FARTHEST = 4  # steps that a search moves a computed one by
AWAY = 3  # moves from the best so far, to search on from there
MOST, WORK = 2_000, 5_000_000  # evaluations of a search; times the square of their unknowns: a tenth of a second


def coherent_terms(compute: Plan, gram: np.ndarray, weights: np.ndarray, switches: Switches = ()) -> dict[int, Terms]:
    """The terms (anchor, weight) of every skipped step; `weights` are c_t of every step, of shape (steps,)."""
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


def coherence(weights: np.ndarray) -> np.ndarray:
    """k(t - u) c_t c_u, of shape (steps, steps)."""
    step = np.arange(len(weights))
    alike = np.exp(-(((step[:, None] - step) / (LENGTH * len(step))) ** 2) / 2) + OWN * np.eye(len(step))
    return alike * np.outer(weights, weights)


def searched(
    start: Plan, gram: np.ndarray, covariance: np.ndarray, forced: Collection[int], switches: Switches = ()
) -> Plan:
    """The cheapest plan found of as many computed steps as `start` has; `forced` ones stay. No slower for longer runs.

    Iterated local search (Lourenco, Martin and Stuetzle 2003): the first move of one computed step that costs less is
    made until none does, then on from some moves away from the best so far. The same arguments give the same plan.
    """

    def cost(plan: Plan) -> float:
        return coherent_cost(plan, gram, covariance, switches)

    draw = random.Random(len(start))
    evaluations = min(MOST, WORK // (ORDER * start.count(False) + 1) ** 2)
    best = plan, least = start, cost(start)
    while evaluations > 0 and (moves := _moves(plan, forced)):
        draw.shuffle(moves)
        for moved in moves[:evaluations]:
            evaluations -= 1
            if (costs := cost(moved)) < least * (1 - 1e-6):
                plan, least = moved, costs
                break
        else:
            best = min(best, (plan, least), key=lambda found: found[1])
            plan = best[0]
            for _ in range(AWAY):
                plan = draw.choice(_moves(plan, forced))
            least = cost(plan)
    return min(best, (plan, least), key=lambda found: found[1])[0]


def _moves(plan: Plan, forced: Collection[int]) -> list[Plan]:
    """The plans in which one computed step is another, up to four away."""
    moved = []
    for step, compute in enumerate(plan):
        if compute and step not in forced:
            for other in range(max(step - FARTHEST, 1), min(step + FARTHEST + 1, len(plan))):
                if not plan[other]:
                    flags = list(plan)
                    flags[step], flags[other] = False, True
                    moved.append(tuple(flags))
    return moved


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
        from_target, from_source = gram[self.targets], gram[self.sources]
        products = from_target[:, self.targets] - from_target[:, self.sources]
        products += from_source[:, self.sources] - from_source[:, self.targets]
        products *= covariance[np.ix_(self.steps, self.steps)]
        normal, cross = products[: self.shifts, : self.shifts], products[: self.shifts, self.shifts :].sum(axis=1)
        alone = float(products[self.shifts :, self.shifts :].sum())
        floor = max(1e-9 * np.trace(normal) / max(self.shifts, 1), np.finfo(float).tiny)
        amounts = -np.linalg.solve(normal + floor * np.eye(self.shifts), cross)
        return amounts, max(alone + float(amounts @ cross), 0.0)
