"""Plans as a request gets them, from settings as a user writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan.compose import CachePlan, compose, full_forwards
from vllm_omni.diffusion.cache.plan.planner import step_weights
from vllm_omni.diffusion.cache.plan.predictors import forecasts
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, parse


def planned(
    config: DiffusionCacheConfig,
    ratios: tuple[float, ...] | None,
    profile: CacheProfile | None,
    steps: int,
    sigmas: Sequence[float],
    switches: tuple[int, ...] = (),
) -> CachePlan:
    """The plan under `config` of a checkpoint with this curve and profile."""
    return compose(parse("magcache", config), ratios, profile, Schedule(steps, tuple(sigmas), switches))


def budgeted(
    config: DiffusionCacheConfig, steps: int, profile: CacheProfile | None = None, switches: tuple[int, ...] = ()
) -> int | None:
    """The full forwards that the budget of `config` buys."""
    return full_forwards(parse("magcache", config), profile, Schedule(steps, (), switches))


def plan_cost(
    plan: Sequence[bool], sigmas: Sequence[float], predictor: str, gram: np.ndarray, gains: np.ndarray
) -> float:
    """How far a plan's forecasts are expected to move the final latents, in the root mean square over elements."""
    weight, total = step_weights(sigmas, gains), 0.0
    for step, terms in forecasts(tuple(plan), sigmas, predictor, gram).items():
        mix = np.zeros(len(plan))
        mix[step] = -1.0
        for anchor, factor in terms:
            mix[anchor] = factor
        total += weight[step] ** 2 * max(float(mix @ gram @ mix), 0.0)
    return float(np.sqrt(total))
