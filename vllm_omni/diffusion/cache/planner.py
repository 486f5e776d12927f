"""The best plan for a promised number of full forwards: exact dynamic programming over expected errors. Pure.

A cost table C[p, s, j] says what it costs to skip every step between the computed steps s and j, p being the computed
step before s (p = s = 0 while there is but one). Every skipped step t pays the expected error of its forecast times
|sigma_t - sigma_(t+1)|: what a wrong velocity moves the latents by. Gram costs divide that by sigma_t: a displacement
at level sigma is one of the noise by 1 / sigma, and what the model then takes for noise shrinks with it (+8, +7 and
+5 dB at 14, 9 and 7 of 28 forwards for `linear` on the demo). j = steps is the end of the run.

Prior art: shortest paths over cached steps (LeMiCa, NeurIPS 2025; DPCache's path-dependent costs, arXiv 2602.22654)
with costs measured by running the model along every edge. Here they come from numbers that a profile has anyway, hence
for any step count, any predictor and any request's budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan import Plan
from vllm_omni.diffusion.cache.predictor import PREDICTORS


def curve_costs(ratios: Sequence[float], sigmas: Sequence[float]) -> np.ndarray:
    """Costs from the magnitude curve alone: MagCache's error of reuse, |1 - prod gamma| (arXiv 2506.09045, eq. 5)."""
    height = np.cumsum(np.log(np.asarray(ratios, dtype=np.float64)))
    errors = np.abs(1 - np.exp(height[None, :] - height[:, None]))
    return _accumulate(errors[None], _moves(sigmas))


def gram_costs(gram: np.ndarray, sigmas: Sequence[float], predictor: str) -> np.ndarray:
    """Costs from the residuals' Gram matrix: root of the expected squared error of this predictor's own forecasts.

    E||r_t - sum_j w_j r_j||^2 = w'G_AA w - 2 w'G_At + G_tt, exactly, for any weights w. Least squares attain the Schur
    complement (L2P, arXiv 2604.26365, learns such weights); other predictors pay more. Predictors of three anchors are
    planned as if they had the last two.
    """
    weigh, order = PREDICTORS[predictor]
    steps = len(sigmas)
    step = np.arange(steps)
    weight = _moves(sigmas) / np.maximum(np.abs(sigmas), np.finfo(np.float32).tiny)
    if order == 1:
        last, target = np.nonzero(step[:, None] < step[None, :])
        errors = np.zeros((1, steps, steps))
        errors[0, last, target] = forecast_error(gram, [last], target, weigh([last], target, sigmas, gram))
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

    Bellman over (number of computed steps, the last two of them): D_n+1[s, j] = min_p D_n[p, s] + C[p, s, j]. The first
    step computes, and with `compute_last_step` the last. ValueError where no such plan exists.
    """
    steps = costs.shape[1]
    least = fewest_forwards(steps, compute_last_step)
    if not least <= nfe <= steps:
        raise ValueError(f"no plan of {steps} steps has {nfe} full forwards: from {least} to {steps}")
    step = np.arange(steps)
    onward = np.where(step[:, None] < step[None, :], costs[..., :steps], np.inf)
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
        pair_costs = np.broadcast_to(onward, (steps, steps, steps))[:, before, last]
        earlier = np.argmin(table[:, before] + pair_costs)
        computed.append(int(before))
        before, last = earlier, before
    return tuple(bool(flag) for flag in np.isin(step, computed))


def plan_cost(costs: np.ndarray, plan: Plan) -> float:
    """What `best_plan` minimises, of any plan that computes step 0."""
    steps = costs.shape[1]
    table = np.broadcast_to(costs, (steps, steps, steps + 1))
    computed = [step for step, compute in enumerate(plan) if compute]
    before = [0, *computed[:-1]]
    return float(sum(table[p, s, j] for p, s, j in zip(before, computed, [*computed[1:], steps], strict=True)))


def fewest_forwards(steps: int, compute_last_step: bool = True) -> int:
    """The first step computes, and the last where it is guarded."""
    return 2 if steps > 1 and compute_last_step else 1


def _moves(sigmas: Sequence[float]) -> np.ndarray:
    """|sigma_t - sigma_(t+1)|; the level after the last step is 0."""
    return np.abs(np.diff([*sigmas, 0.0]))


def _accumulate(errors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """C[p, s, j] from the error E[p, s, t] of each skipped step: the weighted sum over t between s and j."""
    step = np.arange(len(weight))
    paid = np.where(step[:, None] < step[None, :], errors * weight, 0.0)
    return np.concatenate([np.zeros((*paid.shape[:2], 1)), np.cumsum(paid, axis=-1)], axis=-1)
