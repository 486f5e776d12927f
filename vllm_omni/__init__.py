"""Serve diffusion transformers with an activation cache per request, inside one continuous batch.

Importing this package loads nothing heavy: torch, diffusers and pydantic arrive with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_omni.version import __version__

_LAZY = {
    "AsyncOmni": "vllm_omni.entrypoints.async_omni",
    "DiffusionCacheConfig": "vllm_omni.diffusion.data",
    "Omni": "vllm_omni.entrypoints.omni",
    "OmniDiffusionConfig": "vllm_omni.diffusion.data",
    "OmniDiffusionSamplingParams": "vllm_omni.inputs.data",
    "OmniRequestOutput": "vllm_omni.outputs",
}

__all__ = [
    "AsyncOmni",
    "DiffusionCacheConfig",
    "Omni",
    "OmniDiffusionConfig",
    "OmniDiffusionSamplingParams",
    "OmniRequestOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    packages = import_module("vllm_omni.packages")
    if (message := packages.conflict()) is not None:
        raise ImportError(message)
    packages.hide_unloadable()
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
