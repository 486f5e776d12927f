"""The state of a request under MagCache: that of every request whose plan is known before it runs."""

from vllm_omni.diffusion.cache.state import PlannedState as MagCacheState

__all__ = ["MagCacheState"]
