"""Engine arguments. Knows no tensors and no models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.settings import Settings

__all__ = ["DiffusionCacheConfig", "OmniDiffusionConfig"]


class OmniDiffusionConfig(Settings):
    """Engine arguments. `model` is ``demo``, a diffusers folder, or a hub id."""

    model: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str | None = None
    revision: str | None = None
    cache_backend: str | None = "none"
    cache_config: DiffusionCacheConfig | None = None
    max_num_seqs: int = Field(default=16, ge=1, le=4096)
    max_inference_steps: int = Field(default=1000, ge=1)
    max_image_pixels: int = Field(default=4096 * 4096, ge=1)
    enforce_eager: bool = True
    enable_cpu_offload: bool = False
    vae_use_slicing: bool = False
    vae_use_tiling: bool = False
    lora_modules: dict[str, str] = Field(default_factory=dict)  # name that requests use -> file, folder or hub id

    @field_validator("cache_config", mode="before")
    @classmethod
    def _cache_config(cls, value: Any) -> Any:
        if value is None or isinstance(value, DiffusionCacheConfig):
            return value
        return DiffusionCacheConfig.from_dict(value)

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        name = str(value).removeprefix("torch.")
        return {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}.get(
            name, name
        )

    @model_validator(mode="after")
    def _combinations(self) -> OmniDiffusionConfig:
        if self.cache_config is not None and self.cache_backend in (None, "none"):
            raise InvalidValueError("cache_config", "given", "needs a cache_backend, e.g. cache_backend='magcache'")
        if self.cache_config is not None and self.cache_config.mag_calibrate:
            raise InvalidValueError(
                "cache_config.mag_calibrate", True, "is for `vllm-omni calibrate` and plain pipelines, not for serving"
            )
        return self
