"""What stands in for a skipped step's residual, one step at a time: weights over those of earlier computed steps.

Every function has one calling convention: (anchors, target, sigmas, gram) -> one weight per anchor, where `anchors` are
the computed steps to build on in ascending order, `sigmas` the noise level of every step, and `gram` the residuals'
Gram matrix of this schedule (or None). The forecast is sum_j w_j r_j. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan.rule import Plan

Terms = tuple[tuple[int, float], ...]
Predictor = Callable[[Sequence[int], int, Sequence[float], np.ndarray | None], np.ndarray]
RIDGE = 1e-6


def reuse(anchors: Sequence[int], target: int, sigmas: Sequence[float], gram: np.ndarray | None) -> np.ndarray:
    """The last residual as it is (MagCache, arXiv 2506.09045)."""
    return np.array([0.0] * (len(anchors) - 1) + [1.0])


def linear(anchors: Sequence[int], target: int, sigmas: Sequence[float], gram: np.ndarray | None) -> np.ndarray:
    """The line through the last two residuals over sigma (first-order TaylorSeer, arXiv 2503.06923, in sigma)."""
    weights = reuse(anchors, target, sigmas, None)
    if len(anchors) > 1 and (span := sigmas[anchors[-1]] - sigmas[anchors[-2]]):
        ahead = (sigmas[target] - sigmas[anchors[-1]]) / span
        weights[-2:] = -ahead, 1 + ahead
    return weights


def affine(anchors: Sequence[int], target: int, sigmas: Sequence[float], gram: np.ndarray | None) -> np.ndarray:
    """Least squares among weights that sum to one: w = G_AA^-1 (G_At + m 1), m the Lagrange multiplier of 1'w = 1.

    Ordinary kriging (Matheron 1963) over residuals: what all prompts share, a common part, passes through unscaled.
    """
    if gram is None:
        return reuse(anchors, target, sigmas, gram)
    corner, count = gram[np.ix_(anchors, anchors)], len(anchors)
    ridge = max(RIDGE * np.trace(corner) / count, np.finfo(float).tiny)
    free, ones = np.linalg.solve(corner + ridge * np.eye(count), np.stack([gram[anchors, target], np.ones(count)]).T).T
    return free + (1 - free.sum()) / ones.sum() * ones


PREDICTORS: dict[str, tuple[Predictor, int]] = {  # function, how many anchors it looks at
    "reuse": (reuse, 1),
    "linear": (linear, 2),
    "affine": (affine, 2),
}
NEED_GRAM = ("affine",)


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
        weights = weigh(anchors, step, sigmas, gram).tolist()
        terms[step] = tuple((a, w) for a, w in zip(anchors, weights, strict=True) if w != 0.0)
    return terms


def resample_gains(gains: Sequence[float], sigmas: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Gains at other noise levels, linear in sigma; levels outside the calibrated range take the nearest end."""
    order = np.argsort(sigmas)
    return np.interp(wanted, np.asarray(sigmas)[order], np.asarray(gains)[order])


def resample_gram(gram: np.ndarray, sigmas: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """The Gram matrix at other noise levels: that of the residuals interpolated linearly in sigma, P G P'.

    Levels outside the calibrated range take the nearest end.
    """
    known = np.asarray(sigmas)
    order = np.argsort(known)
    mix = np.stack([np.interp(wanted, known[order], unit[order]) for unit in np.eye(len(known))], axis=1)
    return mix @ gram @ mix.T
