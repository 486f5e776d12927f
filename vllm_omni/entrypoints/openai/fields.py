"""The fields of an image request: the official ones, ours, and what each may be. Knows no engine and no sockets."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_omni.entrypoints.openai.errors import ApiError, invalid
from vllm_omni.errors import UnknownKeyError

ALIASES = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "lora_request": "lora",
    "num_outputs_per_prompt": "n",
}
NOT_HERE = ("complexity", "frame_count", "frame_duration_ms", "svg", "markup", "input_fidelity")
F = TypeVar("F", bound="CommonFields")
QUALITY_CACHE: dict[str, str | None] = {
    "max": "off",
    "hd": "off",
    "xhigh": "high",
    "high": "high",
    "auto": None,  # the server's own setting
    "standard": None,
    "medium": "balanced",
    "low": "fast",
}


class CommonFields(BaseModel):
    """What a request may say, whatever it makes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(default=None, max_length=512)
    size: str | None = Field(default=None, max_length=32, description="WIDTHxHEIGHT, or auto: the model's own.")
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    # ours
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    true_cfg_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    negative_prompt: str | None = None
    width: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    cache: str | dict[str, Any] | None = Field(default=None, description="off, a preset, or settings by name.")
    lora: str | dict[str, Any] | list[Any] | None = Field(default=None, description="Names registered at start-up.")
    priority: int | None = Field(default=None, ge=-1000, le=1000)
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class ImageFields(CommonFields):
    """`POST /v1/images/generations`, and all of `/v1/images/edits` but its pictures."""

    n: int | None = Field(default=None, ge=1, description="Pictures; the i-th has the seed seed + i.")
    background: Literal["transparent", "opaque", "auto"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None
    # ours
    strength: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    include_timings: bool | None = None
    stream_progress: bool | None = Field(default=None, description="Progress events between the partial images.")

    @property
    def count(self) -> int:
        return self.n or 1


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object; no NaN, no key twice, no depth that breaks a parser."""
    try:
        value = load_json(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body must be a JSON object in UTF-8", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return value


def load_json(text: bytes | str) -> Any:
    """ApiError that names the key for a key that is there twice, or is NaN or Infinity; ValueError, RecursionError."""
    return json.loads(text, parse_constant=_Constant, object_pairs_hook=_checked)


class _Constant(str):
    """NaN or Infinity, which JSON does not have, until its key is known."""


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise invalid(key[:100], "is given twice")
        if any(isinstance(entry, _Constant) for entry in (value if isinstance(value, list) else [value])):
            raise invalid(key[:100], "must not be NaN or Infinity, which JSON does not have")
        seen[key] = value
    return seen


def check_fields(given: dict[str, Any], *, strict: bool, allow_unknown: bool, max_prompt: int) -> ImageFields:
    """Fields as given -> fields as meant; ApiError for the first that is wrong."""
    return check_fields_of(ImageFields, given, strict=strict, allow_unknown=allow_unknown, max_prompt=max_prompt)


def check_fields_of(kind: type[F], given: dict[str, Any], *, strict: bool, allow_unknown: bool, max_prompt: int) -> F:
    """The same for the fields of any kind of request."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name in NOT_HERE:
            raise invalid(key[:100], f"{key} is not supported by this server", "unsupported_parameter")
        if name not in kind.model_fields:
            if allow_unknown:
                continue
            known = [*kind.model_fields, *ALIASES]
            raise invalid(key[:100], str(UnknownKeyError("the request", key[:100], known)), "unknown_parameter")
        if name in values and values[name] != value:
            raise invalid(key, f"{key} and {name} mean the same and differ; give one")
        values[name] = value
    try:
        fields = kind.model_validate(values, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise invalid(".".join(str(part) for part in first["loc"][:1]), f"{first['loc'][0]}: {first['msg']}") from None
    _check_text("prompt", fields.prompt, max_prompt, blank=False)
    for name in ("negative_prompt", "model", "user", "safety_identifier"):
        _check_text(name, vars(fields)[name] or "", max_prompt, blank=True)
    return fields


def _check_text(name: str, text: str, limit: int, *, blank: bool) -> None:
    if not blank and not text.strip():
        raise invalid(name, f"{name} must not be empty")
    if len(text) > limit:
        raise invalid(name, f"{name} has {len(text)} characters, at most {limit} are taken")
    if "\0" in text:
        raise invalid(name, f"{name} must not contain the NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(name, f"{name} must be valid Unicode, without lone surrogates") from None
