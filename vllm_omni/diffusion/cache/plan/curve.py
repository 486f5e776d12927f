"""Magnitude curves for another number of steps. Pure functions.

gamma_t = mean over tokens of ||r_t|| / ||r_(t-1)||, with gamma_0 = 1 and r_t what the block stack adds at step t
(arXiv 2506.09045, eq. 3). A schedule with more steps has ratios nearer to 1: it is the cumulated log-magnitude that the
schedules share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def resample_log(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Interpolate the cumulated log-magnitude linearly in relative position: keeps the product over the whole run."""
    places = np.arange(steps) * (len(ratios) - 1) / max(1, steps - 1)
    heights = np.interp(places, np.arange(len(ratios)), np.cumsum(np.log((1.0, *ratios[1:]))))
    return (1.0, *np.exp(np.diff(heights)).tolist())


def resample_nearest(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """The reference implementation's choice: the ratio at the nearest relative position."""
    scale = (len(ratios) - 1) / max(1, steps - 1)
    return (1.0, *(ratios[round(step * scale)] for step in range(1, steps)))


def resample(ratios: Sequence[float], steps: int, method: str = "log") -> tuple[float, ...]:
    """`resample_log` or `resample_nearest`, by name."""
    if steps == len(ratios):
        return tuple(ratios)
    return (resample_nearest if method == "nearest" else resample_log)(ratios, steps)
