"""The `cache` of a request: None, "off", a preset's name, or a dict of overrides, over the engine's own setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.diffusion.cache.selector import canonical_name
from vllm_omni.diffusion.data import PRESETS, PROMISES, DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError, check_keys

_SHORT = {
    "threshold": "mag_threshold",
    "max_skip_steps": "mag_max_skip_steps",
    "retention_ratio": "mag_retention_ratio",
}
_OF_THE_ENGINE = {"memory_budget_mb", "mag_calibrate", "residual_dtype"}
_FIELDS = set(DiffusionCacheConfig.model_fields) - _OF_THE_ENGINE

_NAMES = ("auto", *PRESETS)
_RULE = ("preset", *_SHORT, *_SHORT.values())
__all__ = ["PRESETS", "Choice", "request_choice"]

Choice = tuple[str, DiffusionCacheConfig] | None  # backend and settings, or no cache


def request_choice(asked: Any, engine: Choice) -> Choice:
    """What a request gets. `InvalidValueError` or `UnknownKeyError` for what makes no sense."""
    if asked is None:
        return engine
    if isinstance(asked, str):
        if asked in ("off", "none"):
            return None
        if asked not in _NAMES:
            raise InvalidValueError("cache", asked, f"must be 'off', a dict, or one of {', '.join(map(repr, _NAMES))}")
        asked = {"preset": asked}
    if not isinstance(asked, Mapping):
        raise InvalidValueError("cache", asked, "must be None, 'off', a preset's name or a dict of overrides")
    check_keys("cache", asked, {"enabled", "backend", "preset", *_SHORT, *_FIELDS})
    if asked.get("enabled", True) is False or asked.get("backend") in ("none", "off"):
        return None
    default = engine[0] if engine else "magcache"
    backend = canonical_name(asked.get("backend") or default)
    values = _engines_values(engine, backend)
    if (preset := asked.get("preset")) is not None:
        if preset not in _NAMES:
            raise InvalidValueError("cache.preset", preset, f"must be one of {', '.join(map(repr, _NAMES))}")
        values |= PRESETS.get(str(preset), {})
    for key, value in asked.items():
        if key not in ("enabled", "backend", "preset"):
            values[_long_name(str(key), backend)] = value
    _one_plan(asked, values)
    if "profile" in asked and "mag_ratios" not in asked:
        values["mag_ratios"] = None
    return backend, DiffusionCacheConfig.from_dict(values)


def _engines_values(engine: Choice, backend: str) -> dict[str, Any]:
    """What a request inherits: all of the engine's settings, of another backend's only how memory is used."""
    if engine is None:
        return {}
    values = engine[1].model_dump(exclude_unset=True)
    if backend == engine[0]:
        return values
    return {name: value for name, value in values.items() if name in _OF_THE_ENGINE - {"mag_calibrate"}}


def _long_name(key: str, backend: str) -> str:
    if key == "threshold" and backend != "magcache":
        return "rel_l1_thresh"
    return _SHORT.get(key, key)


def _one_plan(asked: Mapping[str, Any], values: dict[str, Any]) -> None:
    """A plan named in the request (promise, mask, preset or threshold rule) replaces the engine's, of whatever kind."""
    named = {key for key in asked if asked[key] is not None}
    promise = next((name for name in PROMISES if name in named), None)
    if promise and (rule := next((name for name in _RULE if name in named), None)):
        raise InvalidValueError(f"cache.{promise}", asked[promise], f"and {rule} each make the plan: give one")
    if "steps_mask" not in asked and (promise or named & {"mag_ratios", "profile", *_RULE}):
        values["steps_mask"] = None
    plan = named & {"steps_mask", *PROMISES, *_RULE}
    for name in PROMISES:
        if name not in asked and plan:
            values[name] = None
    if plan:
        values["preset"] = asked.get("preset") if plan <= {"preset"} else None
