"""What every cache backend is, to the worker and to a plain pipeline. Knows no method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from vllm_omni.diffusion.data import DiffusionCacheConfig


class CacheBackend(ABC):
    """A choice of plan, predictor and profile, put on a pipeline's denoisers."""

    def __init__(self, config: DiffusionCacheConfig) -> None:
        self.config = config
        self.enabled = False

    @abstractmethod
    def enable(self, pipeline: Any) -> None:
        """Prepare the pipeline's denoisers; called once, at model load."""

    @abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> Any:
        """Fresh state for the request that is about to run `num_inference_steps` on `pipeline`."""

    @abstractmethod
    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline as `enable` found it."""

    def is_enabled(self) -> bool:
        return self.enabled

    def __repr__(self) -> str:
        return f"{type(self).__name__}(config={self.config!r})"
