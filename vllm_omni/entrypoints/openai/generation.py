"""From a checked request to what the engine is asked: size, frames, steps, seeds, cache, deadline; within limits."""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from PIL import Image, ImageOps

from vllm_omni.engine.interface import ModelInfo
from vllm_omni.engine.wire import MAX_FRAME_BYTES
from vllm_omni.entrypoints.openai.protocol.errors import invalid
from vllm_omni.entrypoints.openai.protocol.requests import (
    INPUT_REFERENCE,
    QUALITY_CACHE,
    BaseRequest,
    ImageRequest,
    VideoRequest,
)
from vllm_omni.entrypoints.serve_config import Limits
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")
Pictures = tuple[Image.Image, ...]
R = TypeVar("R", bound=BaseRequest)


@dataclass(frozen=True)
class GenerationRequest(Generic[R]):
    """One HTTP request as the engine runs it, with the parameters of each picture, or of the video."""

    request: R
    pictures: Pictures  # given by the client
    params: tuple[OmniDiffusionSamplingParams, ...]
    width: int
    height: int
    timeout_s: float | None

    @property
    def model(self) -> str:
        return self.request.model or ""

    @property
    def prompt(self) -> Any:
        if not self.pictures:
            return self.request.prompt
        image = self.pictures[0] if len(self.pictures) == 1 else list(self.pictures)
        return {"prompt": self.request.prompt, "multi_modal_data": {"image": image}}

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def steps(self) -> int | None:
        return self.params[0].num_inference_steps


def plan_images(
    request: ImageRequest, info: ModelInfo, limits: Limits, pictures: Pictures = ()
) -> GenerationRequest[ImageRequest]:
    """ApiError for what this model or this server does not do, before any work."""
    if request.background == "transparent":
        raise invalid("background", "this model paints opaque pictures; leave it out or say opaque")
    if request.response_format == "url":
        raise invalid("response_format", "pictures come in the reply: b64_json")
    if request.output_compression not in (None, 100) and (request.output_format or "png") == "png":
        raise invalid("output_compression", "is for jpeg and webp; png loses nothing")
    count = request.n or 1
    _at_most(limits.max_n, n=count)
    own = _rounded_down(pictures[0], info) if pictures else None
    width, height = _size(request, info, limits, own)
    common = _parameters(request, info, limits, width, height) | _supported(info, strength=request.strength)
    partial, steps = (request.partial_images or 0) if request.stream else 0, common["num_inference_steps"]
    if partial and steps and info.previews:
        common["preview_every"] = max(1, steps // (partial + 1))
    seed = common.pop("seed")
    params = tuple(OmniDiffusionSamplingParams(**common, seed=(seed + i) % 2**64) for i in range(count))
    return GenerationRequest(request, pictures, params, width, height, request.timeout_s or limits.request_timeout_s)


def plan_video(
    request: VideoRequest, info: ModelInfo, limits: Limits, picture: Image.Image | None
) -> GenerationRequest[VideoRequest]:
    """ApiError as above; the picture is cut to the video's size. There is a time-out only if the client sets one."""
    check_reference(picture is not None, info)
    own = None if picture is None else _same_shape(picture, info)
    width, height = _size(request, info, limits, own)
    frames = _frames(request, info, limits)
    if frames * width * height * 3 > MAX_FRAME_BYTES * 0.99:  # it must cross from the engine's process
        raise invalid("size", f"{frames} frames of {width}x{height} are more than one request may have; ask for less")
    second = request.guidance_scale_2
    if second is not None and ("guidance_scale_2" not in info.parameters or len(info.denoisers) < 2):
        raise invalid("guidance_scale_2", "is for models of two denoisers", "unsupported_parameter")
    common = _parameters(request, info, limits, width, height)
    fps = request.fps or info.fps
    params = OmniDiffusionSamplingParams(**common, num_frames=frames, fps=fps, guidance_scale_2=second)
    pictures = () if picture is None else (ImageOps.fit(picture, (width, height)),)
    return GenerationRequest(request, pictures, (params,), width, height, request.timeout_s)


def check_makes(info: ModelInfo, what: Literal["image", "video"]) -> None:
    """400 if the model that is served makes the other."""
    if info.video_output != (what == "video"):
        other = "videos: use /v1/videos" if info.video_output else "pictures: use /v1/images/generations or edits"
        raise invalid("model", f"this model makes {other}", "unsupported_model")


def check_reference(given: bool, info: ModelInfo) -> None:
    """A picture for a model that begins with one, and for no other."""
    if info.image_input and not given:
        raise invalid(INPUT_REFERENCE, "this model begins with a picture: send one as a file or a data URL")
    if given and not info.image_input:
        raise invalid(INPUT_REFERENCE, "this model takes no picture", "unsupported_parameter")


def _parameters(request: BaseRequest, info: ModelInfo, limits: Limits, width: int, height: int) -> dict[str, Any]:
    """The sampling parameters that pictures and videos share."""
    _at_most(limits.max_steps, num_inference_steps=request.num_inference_steps)
    _at_most(limits.request_timeout_s, timeout_s=request.timeout_s)
    return {
        **_supported(
            info,
            guidance_scale=request.guidance_scale,
            true_cfg_scale=request.true_cfg_scale,
            negative_prompt=request.negative_prompt,
        ),
        "num_inference_steps": request.num_inference_steps or info.defaults.get("num_inference_steps"),
        "seed": request.seed if request.seed is not None else secrets.randbits(32),
        "width": width,
        "height": height,
        "lora_request": request.lora,
        "cache": _cache(request, info),
    }


def _supported(info: ModelInfo, **values: Any) -> dict[str, Any]:
    """`values`; one that the model's pipeline does not have is refused, not dropped."""
    for name, value in values.items():
        if value is not None and name not in info.parameters:
            raise invalid(name, f"this model has no {name}", "unsupported_parameter")
    return values


def _at_most(limit: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value > limit:
            raise invalid(name, f"{name} must be at most {limit:g}")


def _cache(request: BaseRequest, info: ModelInfo) -> Any:
    """The request's own setting, else what its quality stands for; profiles by name only, never a path."""
    asked = request.cache
    if asked is None:
        return QUALITY_CACHE[request.quality or "auto"] if info.cache.get("backend") else None
    if isinstance(asked, str):
        return asked
    known = info.cache.get("profiles", [])
    if (profile := asked.get("profile")) is not None and (not isinstance(profile, str) or profile not in known):
        names = ", ".join(known) or "it has none"
        raise invalid("cache.profile", f"cache.profile must name a profile of this checkpoint: {names}")
    return asked


def _size(request: BaseRequest, info: ModelInfo, limits: Limits, own: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) in pixels: as asked, else `own` (that of a picture given), else the model's."""
    width, height, field = request.width, request.height, None
    if request.size not in (None, "auto"):
        if not (match := _SIZE.fullmatch(request.size or "")):
            raise invalid("size", "size must be auto, or WIDTHxHEIGHT in pixels, e.g. 1024x1024")
        named = int(match[1]), int(match[2])
        if (width or named[0], height or named[1]) != named:
            raise invalid("size", "size and width, height differ; give one of them")
        (width, height), field = named, "size"
    elif width is None and height is None and own is not None:
        width, height = own
    width = width or int(info.defaults.get("width") or 1024)
    height = height or int(info.defaults.get("height") or 1024)
    for name, side in (("width", width), ("height", height)):
        if side < 1 or side % info.size_multiple:
            raise invalid(field or name, f"{name} must be a multiple of {info.size_multiple} pixels, got {side}")
    if width * height > limits.max_pixels:
        larger = "width" if width >= height else "height"
        raise invalid(field or larger, f"a picture may have at most {limits.max_pixels} pixels")
    return width, height


def _rounded_down(picture: Image.Image, info: ModelInfo) -> tuple[int, int]:
    step = info.size_multiple
    return max(step, picture.width // step * step), max(step, picture.height // step * step)


def _same_shape(picture: Image.Image, info: ModelInfo) -> tuple[int, int]:
    """The picture's shape, with as many pixels as the model is made for."""
    area = int(info.defaults.get("width") or 1024) * int(info.defaults.get("height") or 1024)
    scale, step = math.sqrt(area / (picture.width * picture.height)), info.size_multiple
    return max(step, round(picture.width * scale / step) * step), max(step, round(picture.height * scale / step) * step)


def _frames(request: VideoRequest, info: ModelInfo, limits: Limits) -> int:
    """As many as were asked for, or as come nearest to the seconds, or the model's own."""
    multiple, name = info.frame_multiple, "num_frames"
    if request.num_frames is not None:
        frames = request.num_frames
        if request.seconds is not None:
            raise invalid("num_frames", "seconds and num_frames say the same; give one of them")
        if (frames - 1) % multiple:
            nearest = _nearest(frames, multiple)
            raise invalid("num_frames", f"num_frames must be a multiple of {multiple} plus 1, e.g. {nearest}")
    elif request.seconds is not None:
        name, seconds = "seconds", str(request.seconds)
        if not _SECONDS.fullmatch(seconds) or not float(seconds):
            raise invalid("seconds", 'seconds must be a number above 0, such as "4"')
        frames = _nearest(float(seconds) * (request.fps or info.fps), multiple)
    else:
        frames = _nearest(info.defaults.get("num_frames") or 4 * info.fps, multiple)
    if frames > limits.max_frames:
        raise invalid(name, f"a video may have at most {limits.max_frames} frames, these are {frames}")
    return frames


def _nearest(frames: float, multiple: int) -> int:
    return multiple * max(0, round((frames - 1) / multiple)) + 1
