"""The published method's parameters, for a bare denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.cache_names import in_their_words
from vllm_omni.diffusion.cache.settings import SHORT, DiffusionCacheConfig


@dataclass
class MagCacheConfig:
    """Threshold delta, longest run of skips K, retention rho, and the curve; errors name field, value and range."""

    threshold: float = 0.24
    max_skip_steps: int = 5
    retention_ratio: float = 0.1
    num_inference_steps: int = 28
    mag_ratios: Sequence[float] | None = None  # any sequence or tensor; kept as a tuple
    mag_calibrate: bool = False
    transformer_type: str = "FluxTransformer2DModel"

    def __post_init__(self) -> None:
        self.mag_ratios = self.as_cache_config().mag_ratios

    def as_cache_config(self) -> DiffusionCacheConfig:
        """The same settings under the engine's names."""
        own = {SHORT.get(name, name): value for name, value in vars(self).items() if name != "transformer_type"}
        with in_their_words(vars(self), SHORT):
            return DiffusionCacheConfig(**own)
