"""Engine arguments and cache settings. Knows no tensors and no models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vllm_omni.diffusion.settings import Settings
from vllm_omni.errors import InvalidValueError, UnknownChoiceError, check_keys

PredictorName = Literal[
    "reuse", "gamma", "linear", "damped", "mean", "newton", "chebyshev", "normed", "gram", "affine", "affine3"
]
PRESETS: dict[str, dict[str, Any]] = {  # settings of the threshold rule, where a profile has no Gram matrix
    "high": {"mag_threshold": 0.06, "mag_max_skip_steps": 1, "mag_retention_ratio": 0.2},
    "balanced": {"mag_threshold": 0.12, "mag_max_skip_steps": 2, "mag_retention_ratio": 0.15},
    "fast": {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1},
    "paper": {
        "mag_threshold": 0.24,
        "mag_max_skip_steps": 5,
        "mag_retention_ratio": 0.1,
        "predictor": "reuse",
        "compute_last_step": False,
        "curve_resampling": "nearest",
    },
}
PROMISES = ("nfe", "speedup", "seconds")
RULE = ("mag_threshold", "mag_max_skip_steps", "mag_retention_ratio")
MAX_MASK = 10_000
DEVICES = ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "mtia", "xla")  # kinds that torch knows


def as_curve(field: str, value: Any) -> tuple[float, ...] | None:
    """A magnitude curve as floats: any sequence or tensor of finite values > 0, not empty."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidValueError(field, value, "must be a list of numbers, one per step")
    try:
        curve = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        raise InvalidValueError(field, value, "must be a flat list of numbers, one per step") from None
    if not curve:
        raise InvalidValueError(field, value, "must not be empty: give one ratio per step, or leave it out")
    for index, ratio in enumerate(curve):
        if not (math.isfinite(ratio) and ratio > 0):
            raise InvalidValueError(f"{field}[{index}]", ratio, "must be a finite number above 0")
    return curve


class DiffusionCacheConfig(Settings):
    """Settings of the activation cache, of the engine or (as overrides) of one request.

    The ``mag_*`` names are the published ones. `predictor` is what stands in for a skipped step's residual:
    ``reuse`` (the published method), ``linear`` in sigma, ``gram`` (least squares, needs a calibrated profile), or
    ``auto`` (what calibration found best for this checkpoint, otherwise reuse); the others are described in
    `cache/predictor.py`. The plan is one of: a promise (`nfe`, exactly that many full forwards; `speedup`, that many
    times less block work; `seconds` from start to picture on an idle machine), a `steps_mask` (flags, or {"compute":
    [...], "skip": [...]} in alternating runs), the threshold rule, or a `preset`. Nothing given is the preset "auto":
    as few full forwards as the checkpoint's profile found good. A preset is planned where the profile has a Gram
    matrix, and the threshold rule elsewhere. `profile_insist` takes a profile that was measured on other weights.
    `residual_dtype` is what residuals are kept in, for all requests of an engine: "bfloat16" is half the memory where
    the model runs in fp32; "float8" (e4m3, a scale per token) is half of that, for some fidelity (docs/performance.md).
    """

    mag_ratios: tuple[float, ...] | None = None
    num_inference_steps: int | None = Field(default=None, ge=1, le=10_000)
    mag_threshold: float = Field(default=0.24, gt=0, allow_inf_nan=False)
    mag_max_skip_steps: int = Field(default=5, ge=1, le=10_000)
    mag_retention_ratio: float = Field(default=0.1, ge=0, lt=1)
    mag_calibrate: bool = False
    coefficients: tuple[float, ...] | None = None
    rel_l1_thresh: float | None = Field(default=None, gt=0)
    predictor: Literal["auto", PredictorName] = "auto"
    compute_last_step: bool = True
    curve_resampling: Literal["log", "nearest"] = "log"
    steps_mask: tuple[bool, ...] | None = None
    nfe: int | None = None
    speedup: float | None = Field(default=None, allow_inf_nan=False)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    preset: Literal["auto", "high", "balanced", "fast", "paper"] | None = None
    profile: str | None = None
    profile_insist: bool = False
    memory_budget_mb: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    residual_dtype: Literal["model", "bfloat16", "float16", "float8"] = "model"

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The preset's settings filled in; rule settings of one's own end the preset, and no plan at all is "auto"."""
        named = {name for name in (*PROMISES, *RULE, "steps_mask") if values.get(name) is not None}
        preset = values.get("preset", None if named else "auto")
        own = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        merged = own | values
        if any(merged[name] != own[name] for name in RULE if name in own):
            preset = None
        return merged | {"preset": preset}

    @field_validator("mag_ratios", mode="before")
    @classmethod
    def _curve(cls, value: Any) -> Any:
        return as_curve("mag_ratios", value)

    @field_validator("steps_mask", mode="before")
    @classmethod
    def _mask(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            value = _runs(value)
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise InvalidValueError("steps_mask", value, "must be a list of flags, one per step")
        mask = tuple(bool(v) for v in value)
        if not mask or not mask[0]:
            raise InvalidValueError("steps_mask", value, "must begin with a computed step (1)")
        return mask

    @field_validator("nfe")
    @classmethod
    def _nfe(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise InvalidValueError("nfe", value, "must be at least 2 (1 where the last step may be skipped)")
        return value

    @field_validator("speedup")
    @classmethod
    def _speedup(cls, value: float | None) -> float | None:
        if value is not None and value < 1:
            raise InvalidValueError("speedup", value, "must be at least 1, which computes every step")
        return value

    @model_validator(mode="after")
    def _one_plan(self) -> DiffusionCacheConfig:
        named = [name for name in (*PROMISES, "steps_mask", "preset") if vars(self)[name] is not None]
        if len(named) > 1:
            raise InvalidValueError(named[0], vars(self)[named[0]], f"and {named[1]} each make the plan: give one")
        return self

    @property
    def promise(self) -> dict[str, float]:
        """What this request was promised: {"nfe": 14}, {"speedup": 2.0}, or nothing."""
        return {name: value for name in PROMISES if (value := vars(self)[name]) is not None}


def _runs(value: Mapping[str, Any]) -> tuple[bool, ...]:
    """A mask given as {"compute": [6, 2], "skip": [1, 3]}: runs that alternate, computed first (cache-dit's bins)."""
    check_keys("steps_mask", value, ("compute", "skip"))
    computed, skipped = (list(value.get(name) or ()) for name in ("compute", "skip"))
    lengths = computed + skipped
    if any(not isinstance(length, int) or length < 0 for length in lengths) or sum(lengths) > MAX_MASK:
        raise InvalidValueError("steps_mask", value, f"must hold whole numbers that add up to at most {MAX_MASK}")
    pairs = zip_longest(computed, skipped, fillvalue=0)
    return tuple(flag for run, gap in pairs for flag in (True,) * run + (False,) * gap)


class OmniDiffusionConfig(Settings):
    """Engine arguments. `model` is ``demo``, a diffusers folder, or a hub id."""

    model: str = Field(min_length=1)
    cache_backend: str | None = Field(default="none", description="what skips denoising steps")
    cache_config: DiffusionCacheConfig | None = Field(
        default=None, description=f"settings of the cache as JSON, or a preset: {', '.join(PRESETS)}"
    )
    max_num_seqs: int = Field(default=16, ge=1, le=4096, description="requests in one batch")
    max_inference_steps: int = Field(default=1000, ge=1)
    max_image_pixels: int = Field(default=4096 * 4096, ge=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(default="auto", description="type of the weights")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    enforce_eager: bool = Field(default=True, description="do not compile the model")
    enable_cpu_offload: bool = Field(default=False, description="keep idle parts of the model in main memory")
    vae_use_slicing: bool = Field(default=False, description="decode pictures one by one")
    vae_use_tiling: bool = Field(default=False, description="decode large pictures in tiles")
    lora_modules: dict[str, str] = Field(
        default_factory=dict, description="adapters by the names that requests use: a file, a folder or a hub id"
    )

    @field_validator("cache_config", mode="before")
    @classmethod
    def _cache_config(cls, value: Any) -> Any:
        if value is None or isinstance(value, DiffusionCacheConfig):
            return value
        return DiffusionCacheConfig.from_dict(value)

    @field_validator("device")
    @classmethod
    def _device(cls, value: str | None) -> str | None:
        if value is not None and value.partition(":")[0] not in DEVICES:
            raise UnknownChoiceError("device", value, DEVICES, ", with an index if need be, e.g. 'cuda:1'")
        return value

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
