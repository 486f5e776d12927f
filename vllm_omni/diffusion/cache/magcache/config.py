"""The published method's parameters, for a bare denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, as_curve


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
        self.mag_ratios = as_curve("mag_ratios", self.mag_ratios)
        self.as_cache_config()

    def as_cache_config(self) -> DiffusionCacheConfig:
        """The same settings under the engine's names."""
        return DiffusionCacheConfig(
            mag_threshold=self.threshold,
            mag_max_skip_steps=self.max_skip_steps,
            mag_retention_ratio=self.retention_ratio,
            num_inference_steps=self.num_inference_steps,
            mag_ratios=as_curve("mag_ratios", self.mag_ratios),
            mag_calibrate=self.mag_calibrate,
        )
