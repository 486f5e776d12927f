"""From checked fields to what the engine is asked: sizes, steps, seeds, cache and deadline, each within its limit."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.engine.interface import ModelInfo
from vllm_omni.entrypoints.openai.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.fields import QUALITY_CACHE, ImageFields
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
MAX_LIST = 1000  # entries of a curve or mask that a request may bring
MAX_ADAPTERS = 16
MAX_DEPTH = 4


@dataclass(frozen=True)
class Order:
    """One HTTP request as the engine runs it: a prompt, and the parameters of each picture."""

    fields: ImageFields
    prompt: Any
    params: tuple[OmniDiffusionSamplingParams, ...]
    width: int
    height: int
    steps: int | None
    model: str
    priority: int
    timeout_s: float
    partial_images: int
    warnings: tuple[str, ...]
    pictures: int = 0  # given by the client
    input_tokens: int = 0  # latent tokens of those

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def quality(self) -> str:
        return self.fields.quality or "auto"

    @property
    def format(self) -> str:
        return self.fields.output_format or "png"


def make_order(fields: ImageFields, info: ModelInfo, config: ServeConfig, pictures: tuple[Any, ...] = ()) -> Order:
    """ApiError for what this model or this server does not do."""
    model, limits = check_model(fields.model, config), config.limits
    if fields.count > limits.max_n:
        raise invalid("n", f"n must be at most {limits.max_n}")
    if fields.background == "transparent":
        raise invalid("background", "this model paints opaque pictures; leave it out or say opaque")
    if fields.response_format == "url":
        raise invalid("response_format", "pictures come in the reply: b64_json")
    if fields.output_compression not in (None, 100) and (fields.output_format or "png") == "png":
        raise invalid("output_compression", "is for jpeg and webp; png loses nothing")
    width, height = _size(fields, info, config, pictures)
    steps = fields.num_inference_steps or info.defaults.get("num_inference_steps")
    if fields.num_inference_steps and fields.num_inference_steps > limits.max_steps:
        raise invalid("num_inference_steps", f"num_inference_steps must be at most {limits.max_steps}")
    if fields.timeout_s is not None and fields.timeout_s > limits.request_timeout_s:
        raise invalid("timeout_s", f"timeout_s must be at most {limits.request_timeout_s:g} s")
    partial = (fields.partial_images or 0) if fields.stream else 0
    seed = fields.seed if fields.seed is not None else secrets.randbits(32)
    common: dict[str, Any] = {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "guidance_scale": fields.guidance_scale,
        "true_cfg_scale": fields.true_cfg_scale,
        "negative_prompt": fields.negative_prompt,
        "strength": fields.strength,
        "lora_request": _adapters(fields.lora),
        "cache": _cache(fields, info),
        "preview_every": max(1, steps // (partial + 1)) if partial and steps and info.previews else None,
    }
    _known_to_model(common, info)
    params = tuple(OmniDiffusionSamplingParams(**common, seed=(seed + i) % 2**64) for i in range(fields.count))
    prompt: Any = fields.prompt
    if pictures:
        prompt = {"prompt": fields.prompt, "multi_modal_data": {"image": pictures[0]}}
        if len(pictures) > 1:
            prompt["multi_modal_data"]["image"] = list(pictures)
    tokens = sum(round(p.width * p.height * info.tokens_per_pixel) for p in pictures)
    warnings = tuple(f"{name} has no meaning for this model and was ignored" for name in ("style",) if fields.style)
    return Order(
        fields, prompt, params, width, height, steps, model, fields.priority or 0,
        fields.timeout_s or limits.request_timeout_s, partial, warnings, len(pictures), tokens,
    )  # fmt: skip


def check_makes(info: ModelInfo, what: Literal["image", "video"]) -> None:
    """400 where the model that is served makes the other."""
    if info.video_output != (what == "video"):
        other = "videos: use /v1/videos" if info.video_output else "pictures: use /v1/images/generations or edits"
        raise invalid("model", f"this model makes {other}", "unsupported_model")


def check_model(name: str | None, config: ServeConfig) -> str:
    """The name in replies; 404 for one that is not served here."""
    if name is None:
        return config.model_names[0]
    if name not in config.model_names:
        served = ", ".join(config.model_names)
        raise ApiError(404, f"model {name[:100]!r} is not served here; it has: {served}", "model_not_found", "model")
    return name


def _size(fields: ImageFields, info: ModelInfo, config: ServeConfig, pictures: tuple[Any, ...]) -> tuple[int, int]:
    """(width, height) in pixels."""
    width, height = fields.width, fields.height
    if fields.size not in (None, "auto"):
        if not (match := _SIZE.fullmatch(fields.size or "")):
            raise invalid("size", "size must be auto, or WIDTHxHEIGHT in pixels, e.g. 1024x1024")
        named = int(match[1]), int(match[2])
        if (width is not None and width != named[0]) or (height is not None and height != named[1]):
            raise invalid("size", "size and width, height differ; give one of them")
        width, height = named
    elif pictures and width is None and height is None:
        multiple = info.size_multiple
        width, height = (max(multiple, side // multiple * multiple) for side in pictures[0].size)
    width = width or int(info.defaults.get("width") or 1024)
    height = height or int(info.defaults.get("height") or 1024)
    for name, side in (("width", width), ("height", height)):
        if side < 1 or side % info.size_multiple:
            field = name if fields.size in (None, "auto") else "size"
            raise invalid(field, f"{name} must be a multiple of {info.size_multiple} pixels, got {side}")
    if width * height > config.limits.max_pixels:
        field = "size" if fields.size not in (None, "auto") else "width" if width >= height else "height"
        raise invalid(field, f"a picture may have at most {config.limits.max_pixels} pixels")
    return width, height


def _cache(fields: ImageFields, info: ModelInfo) -> Any:
    """The request's own setting, else what its quality stands for; profiles by name only, never a path."""
    asked = fields.cache
    _check_plain(asked, "cache")
    if asked is None:
        return QUALITY_CACHE[fields.quality or "auto"] if info.cache.get("backend") else None
    if isinstance(asked, str):
        return asked
    known = info.cache.get("profiles", [])
    if (profile := asked.get("profile")) is not None and (not isinstance(profile, str) or profile not in known):
        names = ", ".join(known) or "it has none"
        raise invalid("cache.profile", f"cache.profile must name a profile of this checkpoint: {names}")
    return asked


def _adapters(lora: Any) -> Any:
    if isinstance(lora, list) and len(lora) > MAX_ADAPTERS:
        raise invalid("lora", f"at most {MAX_ADAPTERS} adapters")
    _check_plain(lora, "lora")
    return lora


def _check_plain(value: Any, field: str, depth: int = 0) -> None:
    """Refuse what is too much, or could not cross to the engine: no field but these two holds values of any kind."""
    if isinstance(value, dict | list | str) and len(value) > MAX_LIST:
        raise invalid(field[:100], f"may have at most {MAX_LIST} entries")
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        raise invalid(field[:100], f"may be nested {MAX_DEPTH} deep at most")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise invalid(field[:100], "must be valid Unicode, without lone surrogates")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise invalid(field[:100], "must be a number of 64 bits")
    if isinstance(value, dict):
        _check_plain(list(value), field, depth)
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        _check_plain(entry, f"{field}.{key}" if isinstance(value, dict) else field, depth + 1)


def _known_to_model(values: dict[str, Any], info: ModelInfo) -> None:
    """A parameter that the model's pipeline does not have is refused, not dropped."""
    for name in ("guidance_scale", "true_cfg_scale", "negative_prompt", "strength"):
        if values[name] is not None and name not in info.parameters:
            raise invalid(name, f"this model has no {name}", "unsupported_parameter")
