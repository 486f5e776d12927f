"""MagCache (arXiv 2506.09045), per request: a static plan from a magnitude curve, any predictor."""

from vllm_omni.diffusion.cache.magcache.backend import MagCacheBackend
from vllm_omni.diffusion.cache.magcache.config import MagCacheConfig
from vllm_omni.diffusion.cache.magcache.hook import apply_mag_cache_hook
from vllm_omni.diffusion.cache.magcache.strategy import (
    Flux2MagCacheStrategy,
    FluxMagCacheStrategy,
    MagCacheStrategy,
    MagCacheStrategyRegistry,
    get_strategy,
    register_strategy,
)
from vllm_omni.diffusion.cache.state import PlannedState as MagCacheState

__all__ = [
    "Flux2MagCacheStrategy",
    "FluxMagCacheStrategy",
    "MagCacheBackend",
    "MagCacheConfig",
    "MagCacheState",
    "MagCacheStrategy",
    "MagCacheStrategyRegistry",
    "apply_mag_cache_hook",
    "get_strategy",
    "register_strategy",
]
