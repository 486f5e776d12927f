"""The best plan for a number of full forwards: exact dynamic programming over expected errors. Pure.

A cost table C[p, s, j] says what it costs to skip every step between the computed steps s and j, with p the computed
step before s (p = s = 0 while there is but one); j = steps is the end of the run. Planning takes forwards x steps^3.
Every skipped step t pays the square of e_t |sigma_t - sigma_(t+1)| g_t: the expected error of its forecast, times how
far a wrong velocity moves the latents, times the gain, which says what has become of that displacement at the end of
the run. A model that has learnt its pictures by heart forgets early errors (its gains rise from 0.02 to 0.4), one that
makes pictures it has not seen lets them grow; so gains are measured, once per checkpoint, and never assumed.

Prior art: shortest paths over cached steps (LeMiCa, NeurIPS 2025; DPCache's path-dependent costs, arXiv 2602.22654)
with costs measured by running the model along every edge; SenCache's local output sensitivity (arXiv 2602.24208). Here
a closed-form expected error meets a measured gain, hence costs for any step count, predictor and request's budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
from vllm_omni.diffusion.cache.plan.rule import Plan
from vllm_omni.diffusion.cache.plan.schedule import Switches, forced_steps


def gram_costs(
    gram: np.ndarray, sigmas: Sequence[float], predictor: str, gains: np.ndarray | None = None
) -> np.ndarray:
    """Costs from the residuals' Gram matrix: root of the expected squared error of this predictor's own forecasts.

    E||r_t - sum_j w_j r_j||^2 = w'G_AA w - 2 w'G_At + G_tt, exactly, for any weights w. Least squares attain the Schur
    complement (L2P, arXiv 2604.26365, learns such weights); other predictors pay more. Predictors of
    more are planned as if they had the last two. `gains`: one per step, None for equal ones.
    """
    weigh, order = PREDICTORS[predictor]
    steps = len(sigmas)
    step = np.arange(steps)
    errors = np.zeros((steps, steps, steps))
    first, later = np.zeros(steps - 1, dtype=int), step[1:]
    errors[0, 0, 1:] = forecast_error(gram, [first], later, weigh([first], later, sigmas, gram))
    before, last, target = np.nonzero((step[:, None, None] < step[:, None]) & (step[:, None] < step))
    anchors = [before, last][-order:]
    errors[before, last, target] = forecast_error(gram, anchors, target, weigh(anchors, target, sigmas, gram))
    # C[..., s, j] from the error E[..., s, t] of each skipped step: the sum of weighted squares over t between
    paid = np.where(step[:, None] < step, (errors * step_weights(sigmas, gains)) ** 2, 0.0)
    return np.concatenate([np.zeros((*paid.shape[:-1], 1)), np.cumsum(paid, axis=-1)], axis=-1)


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

    The first step computes, and with `compute_last_step` the last. ValueError where no such plan exists. Bellman over
    (number of computed steps, the last two): D_n+1[s, j] = min_p D_n[p, s] + C[p, s, j].
    """
    steps = len(costs)
    least = len(forced_steps(steps, compute_last_step))
    if not least <= nfe <= steps:
        raise ValueError(f"no plan of {steps} steps has {nfe} full forwards: from {least} to {steps}")
    costs, step = np.where(np.isnan(costs), np.inf, costs), np.arange(steps)
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
    return tuple(bool(flag) for flag in np.isin(step, computed))


def step_weights(sigmas: Sequence[float], gains: np.ndarray | None = None) -> np.ndarray:
    """g_t |sigma_t - sigma_(t+1)|: what an error of one in step t's residual moves the final latents by.

    A scheduler of second order (Heun's) stands still at every other call, with which it corrects the step before: the
    final latents move by the mean of both, so that each has half.
    """
    moved = np.abs(np.diff([*sigmas, 0.0]))
    corrects = np.flatnonzero(moved[1:] == 0.0) + 1
    moved[corrects] = moved[corrects - 1] = moved[corrects - 1] / 2
    return moved if gains is None else moved * gains


def confine(costs: np.ndarray, switches: Switches, anew: Callable[[int], np.ndarray]) -> np.ndarray:
    """A cost table with every run of skips over a switch at infinite cost.

    `anew(step)` is the table of the schedule from `step` on: the step at a switch has no other before it.
    """
    for switch in switches:
        costs[:switch, switch, switch:] = anew(switch)[0, 0]
        costs[..., :switch, switch + 1 :] = np.inf
    return costs
