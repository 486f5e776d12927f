"""MagCache on a bare denoiser module, without pipeline or engine."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.cache.magcache.config import MagCacheConfig
from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategy, MagCacheStrategyRegistry
from vllm_omni.diffusion.cache.plan.compose import compose
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.settings import as_curve, parse
from vllm_omni.diffusion.cache.standalone import Session, StandaloneHook, attach, refuse_other_caches
from vllm_omni.diffusion.cache.state import PlannedState
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.denoiser.discover import has_blocks
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.step_tracker import CallTracker
from vllm_omni.errors import InvalidValueError


def apply_mag_cache_hook(
    module: torch.nn.Module, config: MagCacheConfig, strategy: MagCacheStrategy | None = None
) -> StandaloneHook:
    """Cache `module`'s block stack over runs of `config.num_inference_steps` calls; `detach` it to undo.

    A guidance branch is known by the module's `cache_context`; a branch that comes again begins the next step.
    InvalidValueError if it has no list of blocks, or if there is no curve.
    """
    if config.mag_calibrate:
        raise InvalidValueError("mag_calibrate", True, "needs a pipeline: MagCacheBackend, or `vllm-omni calibrate`")
    if not has_blocks(module):
        raise InvalidValueError("transformer", type(module).__name__, "must have a list of blocks to be cached")
    spec = (strategy.spec if strategy is not None else None) or MagCacheStrategyRegistry.spec_of(module)
    passed = strategy.mag_ratios if strategy is not None else MagCacheStrategyRegistry.users_curve(module)
    ratios = as_curve("mag_ratios", config.mag_ratios or passed)
    if ratios is None:
        raise InvalidValueError("mag_ratios", None, "must be given: this class has no curve, calibrate one")
    refuse_other_caches(module)
    settings = parse("magcache", config.as_cache_config())
    store = CacheStore()

    def make(schedule: Schedule) -> PlannedState:
        return PlannedState(compose(settings, ratios, None, schedule), store, vars(config))

    session = Session(CallTracker(config.num_inference_steps), make)
    denoiser = Denoiser(module, spec)
    hook = StandaloneHook("transformer", denoiser, lambda name, arguments: denoiser.stack_for(arguments), session)
    attach(module, hook)
    return hook
