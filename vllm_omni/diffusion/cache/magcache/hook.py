"""MagCache on a bare denoiser module, without pipeline or engine."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.cache.clock import CallClock, Schedule
from vllm_omni.diffusion.cache.magcache.config import MagCacheConfig
from vllm_omni.diffusion.cache.magcache.plan import plan_request
from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategy, MagCacheStrategyRegistry, get_strategy
from vllm_omni.diffusion.cache.request_cache import RequestCache
from vllm_omni.diffusion.cache.standalone import Session, StandaloneHook, attach
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.data import as_curve
from vllm_omni.diffusion.hooks.block_stack import BlockStack
from vllm_omni.errors import InvalidValueError


def apply_mag_cache_hook(
    module: torch.nn.Module, config: MagCacheConfig, strategy: MagCacheStrategy | None = None
) -> StandaloneHook:
    """Cache `module`'s block stack over runs of `config.num_inference_steps` calls; `detach` it to undo.

    A guidance branch is told by the module's `cache_context`; a branch that comes again begins the next step.
    """
    if config.mag_calibrate:
        raise InvalidValueError(
            "mag_calibrate", True, "needs a pipeline: use MagCacheBackend, or `vllm-omni calibrate`"
        )
    name = type(module).__name__
    passed = strategy.mag_ratios if strategy is not None else MagCacheStrategyRegistry.users_curve(name)
    strategy = strategy or get_strategy(name)
    ratios = config.mag_ratios or as_curve("mag_ratios", passed)
    if ratios is None:
        raise InvalidValueError("mag_ratios", None, "must be given: this class has no curve, calibrate one")
    settings = config.as_cache_config()
    store = CacheStore()

    def make(schedule: Schedule) -> RequestCache:
        return RequestCache(plan_request(settings, ratios, None, *schedule), store, config.__dict__)

    session = Session(CallClock(config.num_inference_steps), make)
    hook = StandaloneHook("transformer", BlockStack(module, strategy.spec), strategy.spec, session)
    attach(module, hook)
    return hook
