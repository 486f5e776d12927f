"""Engine arguments. Knows no tensors and no models."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from vllm_omni.diffusion.cache.settings import PRESET_NAMES, DiffusionCacheConfig, engine_backend
from vllm_omni.distributed.config import ParallelConfig, check_combination, gathered
from vllm_omni.errors import InvalidValueError, UnknownChoiceError, check_keys
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.settings import Settings

__all__ = ["DiffusionCacheConfig", "OmniDiffusionConfig"]

SAMPLING = (  # what a model can have defaults for
    "num_inference_steps", "height", "width", "num_frames", "guidance_scale", "guidance_scale_2", "true_cfg_scale",
    "negative_prompt", "strength", "max_sequence_length",
)  # fmt: skip
DEVICES = ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "mtia", "xla")  # kinds that torch knows


class OmniDiffusionConfig(Settings):
    """Engine arguments. `model` is ``demo``, a diffusers folder, a hub id, or ``module:function``."""

    model: str = Field(min_length=1)
    cache_backend: str | None = Field(default="none", description="what skips denoising steps")
    cache_config: DiffusionCacheConfig | None = Field(
        default=None, description=f"settings of the cache as JSON, or a preset: {', '.join(PRESET_NAMES)}"
    )
    max_num_seqs: int = Field(default=16, ge=1, le=4096, description="requests in one batch")
    max_inference_steps: int = Field(default=1000, ge=1)
    max_image_pixels: int = Field(default=4096 * 4096, ge=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(default="auto", description="type of the weights")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    text_encoder_device: str | None = Field(
        default=None, description="where the text encoders run, in a thread of their own (default: with the denoiser)"
    )
    vae_device: str | None = Field(
        default=None, description="where pictures are decoded, in a thread of its own (default: with the denoiser)"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of the device's memory to plan with"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    enforce_eager: bool = Field(default=True, description="do not compile the model")
    enable_cpu_offload: bool = Field(default=False, description="keep idle parts of the model in main memory")
    enable_layerwise_offload: bool = Field(default=False, description="keep all blocks but the running one there")
    quantization: Literal["fp8"] | None = Field(
        default=None, description="keep the denoiser's weights in 8 bits, and compute in the type of --dtype"
    )
    attention_backend: str | None = Field(
        default=None, description="diffusers' name of an attention kernel: native, flash, sage, _native_math, ..."
    )
    join_guidance: bool = Field(default=True, description="make the two calls of a guided step in one forward")
    parallel_config: ParallelConfig = Field(default_factory=ParallelConfig)
    prompt_cache_mb: float = Field(
        default=64.0, ge=0, allow_inf_nan=False, description="embeddings kept for prompts that come again; 0 for none"
    )
    default_sampling_params: dict[str, Any] = Field(
        default_factory=dict, description="defaults of fields that a request leaves out, as JSON: steps, size, ..."
    )
    vae_use_slicing: bool = Field(default=False, description="decode pictures one by one")
    vae_use_tiling: bool = Field(default=False, description="decode large pictures in tiles")
    lora_modules: dict[str, str] = Field(
        default_factory=dict, description="adapters by the names that requests use: a file, a folder or a hub id"
    )
    max_loras: int = Field(
        default=16, ge=1, description="adapters loaded at a time; the one longest unused makes room for another"
    )

    def __init__(self, **values: Any) -> None:
        """Also by the names of the fields of `parallel_config`."""
        super().__init__(**gathered(values))

    @field_validator("parallel_config", "cache_config", mode="before")
    @classmethod
    def _nested(cls, value: Any, info: ValidationInfo) -> Any:
        kind = ParallelConfig if info.field_name == "parallel_config" else DiffusionCacheConfig
        return value if value is None or isinstance(value, kind) else kind.from_dict(value)

    @property
    def component_devices(self) -> dict[str, str]:
        """Where components run that are not with the denoiser, by option."""
        asked = {"text_encoder_device": self.text_encoder_device, "vae_device": self.vae_device}
        return {option: device for option, device in asked.items() if device is not None}

    @field_validator("device", "text_encoder_device", "vae_device")
    @classmethod
    def _device(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value.partition(":")[0] not in DEVICES:
            raise UnknownChoiceError(str(info.field_name), value, DEVICES, ", with an index if need be, e.g. 'cuda:1'")
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        name = str(value).removeprefix("torch.")
        short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
        return short.get(name, name)

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return str(value) if isinstance(value, PurePath) else value

    @field_validator("default_sampling_params")
    @classmethod
    def _sampling(cls, value: dict[str, Any]) -> dict[str, Any]:
        value = value["0"] if list(value) == ["0"] and isinstance(value["0"], dict) else value  # by stage, as elsewhere
        check_keys("default_sampling_params", value, SAMPLING)
        OmniDiffusionSamplingParams(**value)
        return value

    @model_validator(mode="after")
    def _combinations(self) -> OmniDiffusionConfig:
        check_combination(self.parallel_config, self)
        for option, device in self.component_devices.items():
            for offload in ("enable_cpu_offload", "enable_layerwise_offload"):
                if vars(self)[offload]:
                    raise InvalidValueError(option, device, f"cannot be combined with {offload}; leave one out")
        if self.enable_layerwise_offload and self.enable_cpu_offload:
            raise InvalidValueError("enable_layerwise_offload", True, "does what enable_cpu_offload does; give one")
        if self.cache_config is not None and engine_backend(self.cache_backend) == "none":
            raise InvalidValueError("cache_config", "given", "needs a cache_backend, e.g. cache_backend='magcache'")
        if self.cache_config is not None and self.cache_config.mag_calibrate:
            raise InvalidValueError(
                "cache_config.mag_calibrate", True, "is for `vllm-omni calibrate` and plain pipelines, not for serving"
            )
        return self
