"""The best plan for a number of full forwards: exact dynamic programming over expected errors. Pure.

Where a forecast builds on the last computed step alone, a cost table C[s, j] says what it costs to skip every step
between the computed steps s and j, and planning takes full forwards x steps^2; where it builds on two, C[p, s, j] with
p the computed step before s (p = s = 0 while there is but one), and steps times that. j = steps is the end of the run.
Every skipped step t pays the expected error of its forecast times |sigma_t - sigma_(t+1)|, what a wrong velocity moves
the latents by, divided by sigma_(t+1), the level at which they then are: a displacement there is one of the noise by
1 / sigma, and what the model takes for noise shrinks with it (docs/log.md has what that is worth, and what lost).

Prior art: shortest paths over cached steps (LeMiCa, NeurIPS 2025; DPCache's path-dependent costs, arXiv 2602.22654)
with costs measured by running the model along every edge. Here they come from numbers that a profile has anyway, hence
for any step count, any predictor and any request's budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
from vllm_omni.diffusion.cache.plan.rule import Plan
from vllm_omni.diffusion.cache.plan.schedule import Switches, forced_steps


def gram_costs(gram: np.ndarray, sigmas: Sequence[float], predictor: str) -> np.ndarray:
    """Costs from the residuals' Gram matrix: root of the expected squared error of this predictor's own forecasts.

    E||r_t - sum_j w_j r_j||^2 = w'G_AA w - 2 w'G_At + G_tt, exactly, for any weights w. Least squares attain the Schur
    complement (L2P, arXiv 2604.26365, learns such weights); other predictors pay more. Predictors of
    more are planned as if they had the last two.
    """
    weigh, order = PREDICTORS[predictor]
    steps = len(sigmas)
    step = np.arange(steps)
    weight = _weight(sigmas)
    if order == 1:
        last, target = np.nonzero(step[:, None] < step[None, :])
        errors = np.zeros((steps, steps))
        errors[last, target] = forecast_error(gram, [last], target, weigh([last], target, sigmas, gram))
        return _accumulate(errors, weight)
    errors = np.zeros((steps, steps, steps))
    first, later = np.zeros(steps - 1, dtype=int), step[1:]
    errors[0, 0, 1:] = forecast_error(gram, [first], later, weigh([first], later, sigmas, gram))
    before, last, target = np.nonzero((step[:, None, None] < step[:, None]) & (step[:, None] < step))
    weights = weigh([before, last], target, sigmas, gram)
    errors[before, last, target] = forecast_error(gram, [before, last], target, weights)
    return _accumulate(errors, weight)


def forecast_error(
    gram: np.ndarray, anchors: Sequence[np.ndarray], target: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Root of the expected squared error of a forecast; arrays of anchors and targets broadcast."""
    index = np.stack(np.broadcast_arrays(*anchors), axis=-1)
    corner = gram[index[..., :, None], index[..., None, :]]
    cross = gram[index, np.asarray(target)[..., None]]
    squared = np.einsum("...i,...ij,...j->...", weights, corner, weights) - 2 * np.sum(weights * cross, axis=-1)
    return np.sqrt(np.maximum(squared + gram[target, target], 0.0))


def best_plan(costs: np.ndarray, nfe: int, compute_last_step: bool = True) -> Plan:
    """The plan with exactly `nfe` computed steps and the least total cost; the first of equals, on every rank alike.

    The first step computes, and with `compute_last_step` the last. ValueError where no such plan exists.
    """
    steps = costs.shape[1] if costs.ndim == 3 else costs.shape[0]
    least = len(forced_steps(steps, compute_last_step))
    if not least <= nfe <= steps:
        raise ValueError(f"no plan of {steps} steps has {nfe} full forwards: from {least} to {steps}")
    solve = _best_by_pairs if costs.ndim == 3 else _best_by_steps
    computed = solve(costs, nfe, steps, compute_last_step)
    return tuple(bool(flag) for flag in np.isin(np.arange(steps), computed))


def _best_by_steps(costs: np.ndarray, nfe: int, steps: int, compute_last_step: bool) -> list[int]:
    """Bellman over (number of computed steps, the last of them): D_n+1[j] = min_s D_n[s] + C[s, j]."""
    step = np.arange(steps)
    source = step - np.arange(1, steps + 1)[:, None]  # (length of the run, the step it ends before)
    onward = np.where(source >= 0, costs[np.maximum(source, 0), step], np.inf)
    least = np.full(steps, np.inf)
    least[0] = 0.0
    came_from = []
    for _ in range(nfe - 1):
        paths = least[source] + onward
        length = np.argmin(paths, axis=0)
        came_from.append(step - 1 - length)
        least = paths[length, step]
    computed = [steps - 1 if compute_last_step else int(np.argmin(least + costs[:, steps]))]
    for earlier in reversed(came_from):
        computed.append(int(earlier[computed[-1]]))
    return computed


def _best_by_pairs(costs: np.ndarray, nfe: int, steps: int, compute_last_step: bool) -> list[int]:
    """Bellman over (number of computed steps, the last two): D_n+1[s, j] = min_p D_n[p, s] + C[p, s, j]."""
    step = np.arange(steps)
    onward = np.where(step[:, None] < step, costs[..., :steps], np.inf)
    tables = [np.full((steps, steps), np.inf)]
    tables[0][0, 0] = 0.0
    for _ in range(nfe - 1):
        tables.append(np.min(tables[-1][:, :, None] + onward, axis=0))
    ends = tables[-1] + costs[..., steps]
    if compute_last_step:
        ends[:, :-1] = np.inf
    before, last = np.unravel_index(np.argmin(ends), ends.shape)
    computed = [int(last)]
    for table in reversed(tables[:-1]):
        earlier = np.argmin(table[:, before] + onward[:, before, last])
        computed.append(int(before))
        before, last = earlier, before
    return computed


def _weight(sigmas: Sequence[float]) -> np.ndarray:
    """|sigma_t - sigma_(t+1)| / sigma_(t+1), the latter taken for no less than a quarter of sigma_t: the last is 0."""
    level = np.abs([*sigmas, 0.0])
    after = np.maximum(level[1:], level[:-1] / 4)
    return np.abs(np.diff(level)) / np.maximum(after, np.finfo(np.float32).tiny)


def _accumulate(errors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """C[..., s, j] from the error E[..., s, t] of each skipped step: the weighted sum over t between s and j."""
    step = np.arange(len(weight))
    paid = np.where(step[:, None] < step, errors * weight, 0.0)
    return np.concatenate([np.zeros((*paid.shape[:-1], 1)), np.cumsum(paid, axis=-1)], axis=-1)


def confine(costs: np.ndarray, switches: Switches, anew: Callable[[int], np.ndarray]) -> np.ndarray:
    """A cost table with every run of skips over a switch at infinite cost.

    `anew(step)` is the table of the schedule from `step` on: if forecasts build on two steps, the one at a switch has
    no other before it.
    """
    for switch in switches:
        if costs.ndim == 3:
            costs[:switch, switch, switch:] = anew(switch)[0, 0]
        costs[..., :switch, switch + 1 :] = np.inf
    return costs
