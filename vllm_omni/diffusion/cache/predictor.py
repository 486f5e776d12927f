"""What stands in for a skipped step's residual: scalar weights over the residuals of earlier computed steps.

Every function has one calling convention: (anchors, target, sigmas, gram) -> one weight per anchor, where `anchors` are
the computed steps to build on in ascending order, `sigmas` the noise level of every step, and `gram` the residuals'
Gram matrix of this schedule (or None). The forecast is sum_j w_j r_j. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan import Plan

Terms = tuple[tuple[int, float], ...]
Predictor = Callable[[Sequence[int], int, Sequence[float], np.ndarray | None], Sequence[float]]
RIDGE = 1e-6


def reuse(anchors: Sequence[int], target: int, sigmas: Sequence[float], gram: np.ndarray | None) -> Sequence[float]:
    """The last residual as it is (MagCache, arXiv 2506.09045)."""
    return [0.0] * (len(anchors) - 1) + [1.0]


def linear(anchors: Sequence[int], target: int, sigmas: Sequence[float], gram: np.ndarray | None) -> Sequence[float]:
    """The line through the last two residuals over sigma (first-order TaylorSeer, arXiv 2503.06923, in sigma)."""
    if len(anchors) < 2 or sigmas[anchors[-1]] == sigmas[anchors[-2]]:
        return reuse(anchors, target, sigmas, gram)
    before, last = anchors[-2:]
    slope = (sigmas[target] - sigmas[last]) / (sigmas[last] - sigmas[before])
    return [0.0] * (len(anchors) - 2) + [-slope, 1.0 + slope]


def least_squares(
    anchors: Sequence[int], target: int, sigmas: Sequence[float], gram: np.ndarray | None
) -> Sequence[float]:
    """w = (G_AA + ridge)^-1 G_At: the weights with the least expected squared error under the calibrated Gram matrix.

    Linear forecasts of cached features with calibrated weights: L2P (arXiv 2604.26365) learns them by gradient descent
    for one schedule; the matrix gives them in closed form for any anchors.
    """
    if gram is None:
        return reuse(anchors, target, sigmas, gram)
    index = list(anchors)
    corner = gram[np.ix_(index, index)]
    ridge = RIDGE * np.trace(corner) / len(index) * np.eye(len(index))
    return [float(w) for w in np.linalg.solve(corner + ridge, gram[index, target])]


PREDICTORS: dict[str, tuple[Predictor, int]] = {  # function, how many anchors it looks at
    "reuse": (reuse, 1),
    "linear": (linear, 2),
    "gram": (least_squares, 2),
}


def forecasts(plan: Plan, sigmas: Sequence[float], predictor: str, gram: np.ndarray | None) -> dict[int, Terms]:
    """The terms (anchor step, weight) of every skipped step of `plan`; weights of zero are left out."""
    weigh, order = PREDICTORS[predictor]
    terms: dict[int, Terms] = {}
    computed: list[int] = []
    for step, compute in enumerate(plan):
        if compute:
            computed.append(step)
            continue
        anchors = computed[-order:]
        weights = weigh(anchors, step, sigmas, gram)
        terms[step] = tuple((a, w) for a, w in zip(anchors, weights, strict=True) if w != 0.0)
    return terms


def resample_gram(gram: np.ndarray, sigmas: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """The Gram matrix at other noise levels: that of the residuals interpolated linearly in sigma, P G P'.

    Levels outside the calibrated range take the nearest end.
    """
    known = np.asarray(sigmas)
    order = np.argsort(known)
    mix = np.zeros((len(wanted), len(known)))
    for row, sigma in enumerate(wanted):
        place = float(np.interp(sigma, known[order], np.arange(len(known))))
        low = min(int(place), len(known) - 1)
        high = min(low + 1, len(known) - 1)
        mix[row, order[low]] += 1 - (place - low)
        mix[row, order[high]] += place - low
    return mix @ gram @ mix.T
