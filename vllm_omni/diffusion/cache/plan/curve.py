"""Magnitude curves for another number of steps. Pure functions.

gamma_t = mean over tokens of ||r_t|| / ||r_(t-1)||, with gamma_0 = 1 and r_t what the block stack adds at step t
(arXiv 2506.09045, eq. 3). A schedule with more steps has ratios nearer to 1: it is the cumulated log-magnitude that the
schedules share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def resample_log(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Interpolate the cumulated log-magnitude linearly in relative position: keeps the product over the whole run."""
    if steps == len(ratios):
        return tuple(ratios)
    total, heights = 0.0, []
    for index, ratio in enumerate(ratios):
        total += math.log(ratio) if index else 0.0
        heights.append(total)

    def height(step: int) -> float:
        place = step * (len(ratios) - 1) / (steps - 1) if steps > 1 else 0.0
        low = min(int(place), len(ratios) - 1)
        high = min(low + 1, len(ratios) - 1)
        return heights[low] + (place - low) * (heights[high] - heights[low])

    return (1.0, *(math.exp(height(step) - height(step - 1)) for step in range(1, steps)))


def resample_nearest(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """The reference implementation's choice: the ratio at the nearest relative position."""
    if steps == len(ratios):
        return tuple(ratios)
    scale = (len(ratios) - 1) / (steps - 1) if steps > 1 else 0.0
    return (1.0, *(ratios[round(step * scale)] for step in range(1, steps)))


def resample(ratios: Sequence[float], steps: int, method: str = "log") -> tuple[float, ...]:
    """`resample_log` or `resample_nearest`, by name."""
    return (resample_nearest if method == "nearest" else resample_log)(ratios, steps)
