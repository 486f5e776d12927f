"""A request's state under MagCache is the one every static plan has."""

from vllm_omni.diffusion.cache.request_cache import RequestCache

MagCacheState = RequestCache

__all__ = ["MagCacheState"]
