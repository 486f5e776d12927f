"""A run's schedule, and the segments in which one denoiser takes over from another. Pure.

Nothing is forecast across a switch: a denoiser's first step computes, and its others are made of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

Switches = tuple[int, ...]  # the steps at which another denoiser takes over, ascending; none of them is step 0


class Schedule(NamedTuple):
    """What a run will do: its number of steps, the noise level of each, and where another denoiser takes over."""

    steps: int
    sigmas: tuple[float, ...]
    switches: Switches = ()
    left_out: int = 0  # steps of the scheduler before the first: an edit with a strength below 1 begins in the middle

    @property
    def segments(self) -> list[slice]:
        """The steps of each denoiser in a row."""
        return [slice(begin, end) for begin, end in pairwise((0, *self.switches, self.steps))]


def forced_steps(steps: int, compute_last_step: bool = True, switches: Switches = ()) -> frozenset[int]:
    """The steps that every plan computes: the first of each segment, and the last of all if it is guarded."""
    return frozenset({0, *switches, steps - 1} if compute_last_step else {0, *switches})
