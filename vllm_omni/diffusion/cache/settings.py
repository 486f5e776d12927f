"""Settings of the activation cache: what users write, and what it means, parsed once. Knows no tensors and no models.

`DiffusionCacheConfig` is what users write, for the engine or (as overrides) for one request. `parse` turns it into
`CacheSettings`, whose `plan` is one of five kinds; no cache at all is None. Everything behind asks that kind alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from vllm_omni.cache_names import OTHER_NAMES, OURS, differ, in_our_names, in_their_words, is_off, mask_of_bins
from vllm_omni.errors import InvalidValueError, UnknownChoiceError, check_keys
from vllm_omni.settings import Settings

PredictorName = Literal["reuse", "linear", "affine"]
ENGINE_BACKENDS = ("magcache", "easycache", "seacache", "teacache", "fbcache")  # those with a state per request
BACKENDS = (*ENGINE_BACKENDS, "cachedit")
BUDGETS = ("nfe", "speedup", "seconds", "psnr")

_RULE = ("mag_threshold", "mag_max_skip_steps", "mag_retention_ratio")
PLANS = (*BUDGETS, "steps_mask", "preset")
SHORT = dict(zip(("threshold", "max_skip_steps", "retention_ratio"), _RULE, strict=True))
_ENGINE_ONLY = {"memory_budget_mb", "mag_calibrate", "residual_dtype", "calibrate"}


@dataclass(frozen=True)
class Rule:
    """The published threshold rule: delta, K and rho."""

    threshold: float = 0.24
    max_skip_steps: int = 5
    retention_ratio: float = 0.1


@dataclass(frozen=True)
class Budget:
    """What a request may cost, in full forwards, times less block work or seconds; or is to keep, in dB of PSNR."""

    nfe: int | None = None
    speedup: float | None = None
    seconds: float | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class Mask:
    """The computed steps as flags, stretched to the schedule."""

    flags: tuple[bool, ...]


@dataclass(frozen=True)
class Preset:
    """A named point between speed and quality.

    A profile with figures is planned for `psnr`, in dB as in a budget, so that a preset means the same on every model;
    one with a matrix alone at `speedup`; a checkpoint that has only a curve runs `rule`. `settings` go with it.
    """

    name: str
    rule: Rule
    speedup: float = 1.0
    psnr: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()
    planned: bool = True  # False: the rule, whatever the profile has

    def as_config(self) -> dict[str, Any]:
        """The preset as settings of `DiffusionCacheConfig`."""
        return dict(zip(_RULE, vars(self.rule).values(), strict=True)) | dict(self.settings)


@dataclass(frozen=True)
class GateSettings:
    """Thresholds of a gate, which decides from data; None is the published value."""

    threshold: float | None
    max_skip_steps: int | None
    retention_ratio: float


_PAPER = (("predictor", "reuse"), ("compute_last_step", False), ("curve_resampling", "nearest"))
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("high", Rule(0.06, 1, 0.2), 1.5, 45.0),
        Preset("balanced", Rule(0.12, 2, 0.15), 2.0, 38.0),
        Preset("fast", Rule(0.24, 5, 0.1), 3.0, 32.0),
        Preset("paper", Rule(0.24, 5, 0.1), settings=_PAPER, planned=False),
    )
}
AUTO = Preset("auto", Rule(), 2.0, 38.0)
PRESET_NAMES = (AUTO.name, *PRESETS)


def _numbers(field: str, value: Any, what: str) -> tuple[float, ...]:
    """Any sequence or tensor of numbers, one per step; `what` they must be."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidValueError(field, value, f"must be a list of {what}, one per step")
    try:
        return tuple(float(v) for v in value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidValueError(field, value, f"must be a flat list of {what}, one per step") from None


def as_curve(field: str, value: Any) -> tuple[float, ...] | None:
    """A magnitude curve as floats, from any sequence or tensor of finite values > 0 that is not empty."""
    if value is None:
        return None
    curve = _numbers(field, value, "numbers of 1e-6 to 1e6")
    if not curve:
        raise InvalidValueError(field, value, "must not be empty: give one ratio per step, or leave it out")
    for index, ratio in enumerate(curve):
        if not 1e-6 <= ratio <= 1e6:  # products of hundreds of them are taken
            near = ", of 1e-6 to 1e6" * (0 < ratio < math.inf)
            raise InvalidValueError(f"{field}[{index}]", ratio, f"must be a finite number above 0{near}")
    return curve


class DiffusionCacheConfig(Settings):
    """Settings of the activation cache, of the engine or (as overrides) of one request.

    The ``mag_*`` names are the published ones. `predictor` is what stands in for a skipped step's residual:
    ``reuse`` (the published method), ``linear`` in sigma, ``affine`` (least squares, needs a calibrated profile), or
    ``auto``: weights of all steps at once from the profile's matrix (`cache/plan/planner.py`), of whole outputs if it
    has theirs, and without a matrix reuse. The plan is one of: a budget (`nfe`, exactly that many
    full forwards; `speedup`, that many times less block work; `seconds` from start to picture on an idle machine;
    `psnr`, the fewest full forwards with which nine of ten outputs keep so many decibels to the uncached one, by
    what the profile measured), a `steps_mask` (flags, or {"compute": [...], "skip": [...]} in alternating runs), the
    threshold rule, or a `preset`. Nothing given is the preset "auto", 38 dB. A preset is a PSNR if the profile has
    figures, a speed-up if it has a matrix, and the threshold rule otherwise. `calibrate` "auto" is for an engine
    whose checkpoint has no matrix: it learns a profile while it serves, by the published curve, or uncached where
    there is none. `profile_insist` takes a profile that was measured on other weights. `residual_dtype` is what
    residuals are kept in, for all requests of an engine: "bfloat16" is half the memory of a model that runs in
    fp32; "float8" (e4m3, a scale per token) is half of that, for some fidelity (docs/performance.md). cache-dit's
    and SeaCache's settings are taken by their own names, too."""

    def __init__(self, **values: Any) -> None:
        with in_their_words(values, OURS):
            super().__init__(**in_our_names(values))

    mag_ratios: Annotated[tuple[float, ...] | None, BeforeValidator(partial(as_curve, "mag_ratios"))] = None
    num_inference_steps: int | None = Field(default=None, ge=1, le=10_000)
    mag_threshold: float = Field(default=0.24, gt=0, allow_inf_nan=False)
    mag_max_skip_steps: int = Field(default=5, ge=1, le=10_000)
    mag_retention_ratio: float = Field(default=0.1, ge=0, lt=1)
    mag_calibrate: bool = False
    calibrate: Literal["auto", "off"] = "off"
    coefficients: tuple[Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)], ...] | None = None
    rel_l1_thresh: float | None = Field(default=None, gt=0)
    predictor: Literal["auto", PredictorName] = "auto"
    compute_last_step: bool = True
    curve_resampling: Literal["log", "nearest"] = "log"
    steps_mask: tuple[bool, ...] | None = None
    nfe: int | None = Field(default=None, le=10**9)
    speedup: float | None = Field(default=None, le=1e9, allow_inf_nan=False)
    seconds: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    psnr: float | None = Field(default=None, gt=0, le=200, allow_inf_nan=False)
    preset: Literal["auto", "high", "balanced", "fast", "paper"] | None = None
    profile: str | None = None
    profile_insist: bool = False
    memory_budget_mb: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    residual_dtype: Literal["model", "bfloat16", "float16", "float8"] = "model"

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A preset's settings filled in; rule settings of one's own end the preset, and no plan at all is "auto"."""
        named = any(values.get(name) is not None for name in (*PLANS, *_RULE))
        preset = values.get("preset") or (None if named else AUTO.name)
        own = PRESETS[preset].as_config() if isinstance(preset, str) and preset in PRESETS else {}
        merged = own | values
        if any(differ(merged[name], own[name]) for name in _RULE if name in own):
            preset = None
        return merged | {"preset": preset}

    @field_validator("steps_mask", mode="before")
    @classmethod
    def _mask(cls, value: Any) -> Any:
        if value is None:
            return None
        flags = _numbers("steps_mask", mask_of_bins(value) if isinstance(value, Mapping) else value, "flags, 0 or 1")
        if not flags or not flags[0] or {*flags} - {0, 1}:
            raise InvalidValueError("steps_mask", value, "must begin with a computed step (1), and hold 0 and 1 alone")
        return tuple(map(bool, flags))

    @field_validator(*BUDGETS, *_RULE, "rel_l1_thresh", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            raise InvalidValueError(str(info.field_name), value, "must be a number")
        return value

    @field_validator("profile")
    @classmethod
    def _profile(cls, value: str | None) -> str | None:
        try:
            Path(value or "").is_file()
        except OSError as error:  # a name that is too long, or a folder that may not be searched
            raise InvalidValueError("profile", value, f"cannot be read ({error.strerror}); give another file") from None
        return value

    @field_validator("nfe", "speedup")
    @classmethod
    def _from_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and value < 1:
            least = {"nfe": "2 (1 if the last step may be skipped)", "speedup": "1, which computes every step"}
            raise InvalidValueError(str(info.field_name), value, f"must be at least {least[str(info.field_name)]}")
        return value

    @model_validator(mode="after")
    def _one_plan(self) -> DiffusionCacheConfig:
        given = self.given(*PLANS)
        if len(given) > 1:
            first, second, *_ = given
            raise InvalidValueError(first, given[first], f"and {second} each make the plan: give one")
        if self.mag_calibrate and self.calibrate == "auto":
            fix = "learns while an engine serves, mag_calibrate measures a plain pipeline; give one of them"
            raise InvalidValueError("calibrate", "auto", fix)
        if self.psnr is not None and not self.as_measured:
            fix = "was measured without mag_ratios, another predictor, or compute_last_step off; leave these out"
            raise InvalidValueError("psnr", self.psnr, fix)
        return self

    @property
    def as_measured(self) -> bool:
        """Whether a profile's decibels, which were measured with nothing else set, hold for these settings."""
        return self.predictor == "auto" and self.compute_last_step and not self.mag_ratios

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named settings that have a value."""
        values = dict(self)
        return {name: values[name] for name in names if values[name] is not None}


PlanChoice = Budget | Mask | Preset | Rule | GateSettings


class CacheSettings(NamedTuple):
    """What a request gets: a backend, the kind of its plan, and the other settings."""

    backend: str
    plan: PlanChoice
    config: DiffusionCacheConfig


def canonical_name(name: Any) -> str:
    """`magcache` for `mag_cache` and `MagCache`, "none" for no cache; else InvalidValueError lists the choices."""
    if name is None or is_off(name):
        return "none"
    plain = name.lower().replace("_", "").replace("-", "") if isinstance(name, str) else ""
    if plain not in BACKENDS:
        raise UnknownChoiceError("cache_backend", name, ("none", *ENGINE_BACKENDS))
    return plain


def engine_backend(name: Any) -> str:
    """`name` as the engine takes it: the canonical name of a backend with a state per request, or "none"."""
    if (plain := canonical_name(name)) not in ("none", *ENGINE_BACKENDS):
        fix = "keeps one state per model and cannot serve requests; take 'fbcache', the same rule"
        raise InvalidValueError("cache_backend", name, fix)
    return plain


def parse(backend: str, config: DiffusionCacheConfig) -> CacheSettings:
    """The settings of `backend` (its canonical name) with the plan that `config` asks for: the one place that says."""
    for name, value in config.given("coefficients", "rel_l1_thresh").items() if backend == "magcache" else ():
        raise InvalidValueError(name, value, "is a gate's setting, magcache has no use for it; leave it out")
    rule = Rule(config.mag_threshold, config.mag_max_skip_steps, config.mag_retention_ratio)
    plan: PlanChoice
    if backend != "magcache":
        longest = config.mag_max_skip_steps if "mag_max_skip_steps" in config.model_fields_set else None
        plan = GateSettings(config.rel_l1_thresh, longest, config.mag_retention_ratio)
    elif config.steps_mask is not None:
        plan = Mask(config.steps_mask)
    elif budget := config.given(*BUDGETS):
        plan = Budget(**budget)
    elif config.preset is not None:
        plan = PRESETS.get(config.preset, AUTO)
    else:
        plan = rule
    return CacheSettings(backend, plan, config)


def override(asked: Any, engine: CacheSettings | None) -> CacheSettings | None:
    """What a request gets that asks for `asked`, its `cache`, over the engine's own settings; None is no cache.

    `asked` is None, "off", a preset's name, or a dict of overrides. InvalidValueError or UnknownKeyError names what
    makes no sense.
    """
    if asked is None:
        return engine
    if is_off(asked):
        return None
    if isinstance(asked, str):
        if asked not in PRESET_NAMES:
            raise UnknownChoiceError("cache", asked, ("off", *PRESET_NAMES), ", or a dict")
        asked = {"preset": asked}
    if not isinstance(asked, Mapping):
        raise InvalidValueError("cache", asked, "must be None, 'off', a preset's name or a dict of overrides")
    known = {"enabled", "backend", *SHORT, *OTHER_NAMES, *set(DiffusionCacheConfig.model_fields) - _ENGINE_ONLY}
    check_keys("cache", asked, known)
    given, asked = asked, in_our_names({name: value for name, value in asked.items() if value is not None})
    if not isinstance(enabled := asked.get("enabled", True), bool):
        raise InvalidValueError(
            "cache.enabled", enabled, "must be true or false; leave it out for the engine's setting"
        )
    if not enabled or is_off(name := asked.get("backend")):
        return None
    if not isinstance(preset := asked.get("preset"), str | None) or preset not in (None, *PRESET_NAMES):
        raise UnknownChoiceError("cache.preset", preset, PRESET_NAMES)
    budget = next((name for name in BUDGETS if name in asked), None)
    if budget and (rule := next((name for name in ("preset", *SHORT, *_RULE) if name in asked), None)):
        raise InvalidValueError(f"cache.{budget}", asked[budget], f"and {rule} each make the plan: give one")
    with in_their_words(given, {"backend": "cache_backend"}):
        backend = engine_backend(name if name is not None else engine.backend if engine else "magcache")
    short: dict[str, str] = SHORT if backend == "magcache" else SHORT | {"threshold": "rel_l1_thresh"}
    for name in asked.keys() & short.keys():
        if differ(asked[name], other := asked.get(short[name], asked[name])):
            fix = f"and {short[name]} {other!r} are one setting: give one value"
            raise InvalidValueError(f"cache.{name}", asked[name], fix)
    own = {short.get(str(key), str(key)): asked[key] for key in asked if key not in ("enabled", "backend")}
    with in_their_words(given, OURS | short):
        return parse(backend, DiffusionCacheConfig.from_dict(_inherited(engine, backend, own) | own))


def made_with(backend: str, engine: CacheSettings | None) -> DiffusionCacheConfig:
    """What a backend that requests ask for by name is made with: the engine's settings, and nothing of a request's."""
    if engine is not None and engine.backend == backend:
        return engine.config
    return DiffusionCacheConfig.from_dict(_inherited(engine, backend, {}))


def _inherited(engine: CacheSettings | None, backend: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings that hold for a request as well; of another backend's, how memory is used.

    A plan that the request names (budget, mask, preset or rule) replaces the engine's, of whatever kind.
    """
    if engine is None:
        return {}
    values = engine.config.model_dump(exclude_unset=True)
    if backend != engine.backend:
        return {name: value for name, value in values.items() if name in _ENGINE_ONLY - {"mag_calibrate", "calibrate"}}
    replaced: set[str] = set()
    if own.keys() & {*PLANS, *_RULE}:
        replaced |= {*PLANS, *dict(PRESETS.get(engine.config.preset or "", AUTO).settings)}
    if own.keys() & {"mag_ratios", "profile"}:
        replaced |= {"steps_mask"}
    if "preset" in own:
        replaced |= {*_RULE, *dict(PRESETS.get(own["preset"], AUTO).settings)}
    if "profile" in own and "mag_ratios" not in own:
        replaced |= {"mag_ratios"}
    return {name: value for name, value in values.items() if name not in replaced}
