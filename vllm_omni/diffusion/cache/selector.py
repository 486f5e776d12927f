"""The factory: a backend by name. Importing it imports no backend and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, canonical_name

if TYPE_CHECKING:
    from vllm_omni.diffusion.cache.base import CacheBackend

_BACKENDS = {
    "magcache": ("vllm_omni.diffusion.cache.magcache.backend", "MagCacheBackend"),
    "easycache": ("vllm_omni.diffusion.cache.gates.easycache", "EasyCacheBackend"),
    "seacache": ("vllm_omni.diffusion.cache.gates.seacache", "SeaCacheBackend"),
    "teacache": ("vllm_omni.diffusion.cache.gates.teacache", "TeaCacheBackend"),
    "fbcache": ("vllm_omni.diffusion.cache.gates.fbcache", "FirstBlockBackend"),
    "cachedit": ("vllm_omni.quality.cache_dit", "CacheDitBackend"),
}


def get_cache_backend(
    name: str | None, config: DiffusionCacheConfig | Mapping[str, Any] | None = None
) -> CacheBackend | None:
    """The backend `name` with `config`; None for None and "none". InvalidValueError for a name that nobody has."""
    if (plain := canonical_name(name)) == "none":
        return None
    module, attribute = _BACKENDS[plain]
    if not isinstance(config, DiffusionCacheConfig):
        config = DiffusionCacheConfig.from_dict({} if config is None else config)
    backend: CacheBackend = vars(import_module(module))[attribute](config)
    return backend
