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
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.specs import DENOISERS, spec_of, unwrapped
from vllm_omni.diffusion.denoiser.step_tracker import CallTracker
from vllm_omni.errors import InvalidValueError


def apply_mag_cache_hook(
    module: torch.nn.Module, config: MagCacheConfig, strategy: MagCacheStrategy | None = None
) -> StandaloneHook:
    """Cache `module`'s block stack over runs of `config.num_inference_steps` calls; `detach` it to undo.

    A guidance branch is known by the module's `cache_context`; a branch that comes again begins the next step.
    InvalidValueError if neither `strategy` nor the table of denoisers knows the blocks, or if there is no curve.
    """
    if config.mag_calibrate:
        raise InvalidValueError(
            "mag_calibrate", True, "needs a pipeline: use MagCacheBackend, or `vllm-omni calibrate`"
        )
    name = type(unwrapped(module)).__name__
    spec = (strategy.spec if strategy is not None else None) or MagCacheStrategyRegistry.spec_of(module)
    if (spec := spec or spec_of(module)) is None:
        raise InvalidValueError("transformer class", name, f"must be one of {', '.join(sorted(DENOISERS))}")
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
    hook = StandaloneHook("transformer", BlockStack(unwrapped(module), spec), spec, session)
    attach(module, hook)
    return hook
