"""Which steps compute: pure functions over the step index and static numbers. No tensors, no state.

A plan is a tuple of booleans, one per step, True where the blocks run. Step 0 is always True.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

Plan = tuple[bool, ...]
THRESHOLDS = (1e-6, 1e6)  # between these, the rule goes from computing every step to skipping all it may


def magcache_plan(
    ratios: Sequence[float],
    threshold: float,
    max_skip_steps: int,
    retention_ratio: float,
    compute_last_step: bool = True,
    others: Sequence[Sequence[float]] = (),
) -> Plan:
    """MagCache's threshold rule (Ma et al., NeurIPS 2025, arXiv 2506.09045, algorithm 1).

    From step int(rho T + 0.5) on, the magnitude error |1 - prod gamma| of keeping the last residual is summed; a step
    is skipped while the sum stays within `threshold` and the run within `max_skip_steps`. `ratios` is gamma, one per
    step. `compute_last_step` is our guard: magnitudes fall fastest at the end, where an error is not mended any more.
    `others` are the curves of further guidance branches: the decision is joint, so the worst of the errors decides.
    """
    steps = len(ratios)
    retention = int(retention_ratio * steps + 0.5)
    plan = []
    curves = (ratios, *others)
    products, errors, run = [1.0] * len(curves), [0.0] * len(curves), 0
    for step in range(steps):
        skip = False
        if step >= retention and step > 0:
            products = [product * curve[step] for product, curve in zip(products, curves, strict=True)]
            errors = [error + abs(1 - product) for error, product in zip(errors, products, strict=True)]
            run += 1
            skip = max(errors) <= threshold and run <= max_skip_steps
        if not skip:
            products, errors, run = [1.0] * len(curves), [0.0] * len(curves), 0
        plan.append(not skip)
    if compute_last_step:
        plan[-1] = True
    return tuple(plan)


def rule_with(plan_at: Callable[[float, int, float], Plan], steps: int, nfe: int) -> Plan:
    """The published rule's plan with exactly `nfe` computed steps, at a threshold that leaves that number.

    `plan_at` maps (threshold, max_skip_steps, retention_ratio) to the rule's plan on a checkpoint's curves. K and rho
    are the published ones; they give way, in this order, if no threshold leaves so few. Should the rule jump over the
    number, the steps that are missing are computed in the middle of its longest runs of skips.
    """
    longest, retention = next(
        ((k, rho) for k, rho in ((5, 0.1), (8, 0.1), (steps, 0.1)) if sum(plan_at(THRESHOLDS[1], k, rho)) <= nfe),
        (steps, 0.0),
    )
    low, high = THRESHOLDS
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if sum(plan_at(middle, longest, retention)) <= nfe else (middle, high)
    plan = list(plan_at(high, longest, retention))
    if sum(plan) < nfe:  # the number is not quite monotonic in the threshold: look everywhere
        plans = (plan_at(10 ** (i / 80 - 4), longest, retention) for i in range(400))
        plan = list(next((found for found in plans if sum(found) == nfe), plan))
    while sum(plan) < nfe:
        runs = [list(run) for skip, run in groupby(range(steps), lambda step: not plan[step]) if skip]
        widest = max(runs, key=len)
        plan[widest[len(widest) // 2]] = True
    return tuple(plan)


def mask_plan(mask: Sequence[bool], steps: int, compute_last_step: bool = True) -> Plan:
    """A fixed mask, stretched to `steps` by the nearest position where its length differs."""
    last = len(mask) - 1
    picked = [bool(mask[round(i * last / (steps - 1))]) if steps > 1 else True for i in range(steps)]
    picked[0] = True
    if compute_last_step:
        picked[-1] = True
    return tuple(picked)
