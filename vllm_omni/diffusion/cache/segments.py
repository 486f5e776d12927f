"""Schedules in which one denoiser takes over from another: nothing is forecast across the switch. Pure.

`switches` are the steps at which another denoiser takes over, ascending; none of them is step 0. Each is the first of
a segment that is planned as if the run began there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

Switches = tuple[int, ...]


def segments(steps: int, switches: Switches) -> list[slice]:
    """The steps of each denoiser in a row."""
    return [slice(begin, end) for begin, end in pairwise((0, *switches, steps))]


def forced_steps(steps: int, compute_last_step: bool = True, switches: Switches = ()) -> frozenset[int]:
    """The steps that every plan computes: the first of each segment, and the last of all where it is guarded."""
    return frozenset({0, *switches, steps - 1} if compute_last_step else {0, *switches})


def confine(costs: np.ndarray, switches: Switches, anew: Callable[[int], np.ndarray]) -> np.ndarray:
    """`planner`'s cost table with every run of skips over a switch at infinite cost.

    `anew(step)` is the table of the schedule from `step` on: where forecasts build on two steps, the one at a switch
    has no other before it.
    """
    for switch in switches:
        if costs.ndim == 3:
            costs[:switch, switch, switch:] = anew(switch)[0, 0]
        costs[..., :switch, switch + 1 :] = np.inf
    return costs
