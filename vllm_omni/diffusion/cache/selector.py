"""The factory: a backend by name. Importing it imports no backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError, UnknownChoiceError

_BACKENDS = {
    "magcache": ("vllm_omni.diffusion.cache.magcache", "MagCacheBackend"),
    "easycache": ("vllm_omni.diffusion.cache.easycache", "EasyCacheBackend"),
    "seacache": ("vllm_omni.diffusion.cache.seacache", "SeaCacheBackend"),
    "teacache": ("vllm_omni.diffusion.cache.teacache", "TeaCacheBackend"),
    "fbcache": ("vllm_omni.diffusion.cache.fbcache", "FirstBlockBackend"),
    "cachedit": ("vllm_omni.diffusion.cache.cache_dit", "CacheDitBackend"),
}
ENGINE_BACKENDS = tuple(name for name in _BACKENDS if name != "cachedit")  # those with a state per request


def canonical_name(name: str) -> str:
    """`mag_cache`, `MagCache` and `mag-cache` are `magcache`; InvalidValueError (a ValueError) lists the choices."""
    plain = str(name).lower().replace("_", "").replace("-", "")
    if plain not in _BACKENDS:
        raise UnknownChoiceError("cache_backend", name, ("none", *ENGINE_BACKENDS))
    return plain


def engine_backend(name: str | None) -> str:
    """`name` as the engine takes it: the canonical name of a backend with a state per request, or "none"."""
    if name is None or name.lower() == "none":
        return "none"
    if (plain := canonical_name(name)) not in ENGINE_BACKENDS:
        fix = "keeps one state per model and cannot serve requests; take 'fbcache', the same rule per request"
        raise InvalidValueError("cache_backend", name, fix)
    return plain


def get_cache_backend(
    name: str | None, config: DiffusionCacheConfig | Mapping[str, Any] | None = None
) -> CacheBackend | None:
    """The backend `name` with `config`; None for None and "none"."""
    if name is None or str(name).lower() == "none":
        return None
    module, attribute = _BACKENDS[canonical_name(name)]
    if config is None:
        config = DiffusionCacheConfig()
    elif not isinstance(config, DiffusionCacheConfig):
        config = DiffusionCacheConfig.from_dict(config)
    factory: Callable[[DiffusionCacheConfig], CacheBackend] = getattr(import_module(module), attribute)
    return factory(config)
