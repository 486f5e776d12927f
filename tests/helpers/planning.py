"""Plans as a request gets them, from settings as a user writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_omni.diffusion.cache.plan.compose import CachePlan, budgeted_forwards, compose
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
    return budgeted_forwards(parse("magcache", config), profile, steps, switches)


def planned_cost(costs: np.ndarray, plan: Sequence[bool]) -> float:
    """What `best_plan` minimises, of any plan that computes step 0."""
    computed = [step for step, compute in enumerate(plan) if compute]
    onward = [*computed[1:], len(plan)]
    return float(costs[[0, *computed[:-1]], computed, onward].sum())
