"""From a checked request to what the engine is asked: size, frames, steps, seeds, cache, deadline; within limits."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from PIL import Image, ImageOps

from vllm_omni.engine.interface import ModelInfo
from vllm_omni.engine.pictures import Sent
from vllm_omni.engine.wire import MAX_FRAME_BYTES
from vllm_omni.entrypoints.openai.protocol.bodies import Body, Source
from vllm_omni.entrypoints.openai.protocol.errors import invalid
from vllm_omni.entrypoints.openai.protocol.requests import (
    INPUT_REFERENCE,
    QUALITY_CACHE,
    BaseRequest,
    ImageRequest,
    SoundRequest,
    VideoRequest,
)
from vllm_omni.entrypoints.serve_config import Limits
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")
# Names that clients give to a picture, and the pipeline's arguments for it; the first that the model has is meant.
_ARGUMENTS = {
    "image": ("image", "images", "cond_image", "control_image"),
    "mask": ("mask_image", "mask", "control_mask"),
    "control_image": ("control_image",),
}
_MEANT = {
    "images": "image",
    "url": "image",
    "messages": "image",
    INPUT_REFERENCE: "image",
    "image_reference": "image",
    "mask_image": "mask",
}
Pictures = Mapping[str, tuple[Image.Image | Sent, ...]]  # by the pipeline's argument
R = TypeVar("R", bound=BaseRequest)


@dataclass(frozen=True)
class GenerationRequest(Generic[R]):
    """One HTTP request as the engine runs it, with the parameters of each picture, or of the video."""

    request: R
    pictures: Pictures
    params: tuple[OmniDiffusionSamplingParams, ...]
    width: int
    height: int
    timeout_s: float | None
    salt: str = ""  # who asks; see `salt_of`

    @property
    def model(self) -> str:
        return self.request.model or ""

    @property
    def prompt(self) -> Any:
        if not self.pictures:
            return self.request.prompt
        one = {name for name, found in self.pictures.items() if len(found) == 1} - {"images"}
        media = {name: found[0] if name in one else list(found) for name, found in self.pictures.items()}
        return {"prompt": self.request.prompt, "multi_modal_data": media}

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}" if self.width else ""

    @property
    def steps(self) -> int | None:
        return self.params[0].num_inference_steps


def plan_images(
    request: ImageRequest, info: ModelInfo, limits: Limits, pictures: Pictures | None = None
) -> GenerationRequest[ImageRequest]:
    """ApiError for what this model or this server does not do, before any work."""
    if request.background == "transparent":
        raise invalid("background", "this model paints opaque pictures; leave it out or say opaque")
    if request.response_format == "url" or (request.response_format == "file" and request.stream):
        raise invalid("response_format", "pictures come in the reply: b64_json, or file without stream")
    if request.output_compression not in (None, 100) and (request.output_format or "png") == "png":
        raise invalid("output_compression", "is for jpeg and webp; png loses nothing")
    if request.strength == 0:
        raise invalid("strength", "strength must be above 0: the picture would come back as it is")
    count = request.n or 1
    _at_most(limits.max_n, n=count)
    pictures = pictures or {}
    first = next(iter(pictures.values()), None)
    width, height = _size(request, info, limits, _size_like(first[0], info) if first else None)
    common = _parameters(request, info, limits, width, height) | _supported(info, strength=request.strength)
    partial, steps = (request.partial_images or 0) if request.stream else 0, common["num_inference_steps"]
    if partial and steps and info.previews:
        common["preview_every"] = max(1, steps // (partial + 1))
    seed = common.pop("seed")
    params = tuple(OmniDiffusionSamplingParams(**common, seed=(seed + i) % 2**64) for i in range(count))
    return GenerationRequest(request, pictures, params, width, height, request.timeout_s or limits.request_timeout_s)


def plan_video(
    request: VideoRequest, info: ModelInfo, limits: Limits, pictures: Pictures
) -> GenerationRequest[VideoRequest]:
    """ApiError as above; the picture is cut to the video's size. There is a time-out only if the client sets one."""
    first = next(iter(pictures.values()), None)
    width, height = _size(request, info, limits, _same_shape(first[0], info) if first else None)
    frames = _frames(request, info, limits)
    if frames * width * height * 3 > MAX_FRAME_BYTES * 0.99:  # it must cross from the engine's process
        raise invalid("size", f"{frames} frames of {width}x{height} are more than one request may have; ask for less")
    second = request.guidance_scale_2
    if second is not None and ("guidance_scale_2" not in info.parameters or len(info.denoisers) < 2):
        raise invalid("guidance_scale_2", "is for models of two denoisers", "unsupported_parameter")
    common = _parameters(request, info, limits, width, height) | {"boundary_ratio": request.boundary_ratio}
    fps = request.fps or info.fps
    params = OmniDiffusionSamplingParams(**common, num_frames=frames, fps=fps, guidance_scale_2=second)
    pictures = {name: tuple(_fitted(one, (width, height)) for one in found) for name, found in pictures.items()}
    return GenerationRequest(request, pictures, (params,), width, height, request.timeout_s)


def plan_sound(request: SoundRequest, info: ModelInfo, limits: Limits) -> GenerationRequest[SoundRequest]:
    """ApiError as above."""
    _supported(info, size=request.size, width=request.width, height=request.height)
    _at_most(limits.max_seconds, seconds=request.seconds)
    common = _parameters(request, info, limits, None, None) | {"seconds": request.seconds}
    timeout_s = request.timeout_s or limits.request_timeout_s
    return GenerationRequest(request, {}, (OmniDiffusionSamplingParams(**common),), 0, 0, timeout_s)


_MAKES = {
    "image": "pictures: use /v1/images/generations or edits",
    "video": "videos: use /v1/videos",
    "sound": "sounds: use /v1/audio/generate",
}


def check_makes(info: ModelInfo, what: Literal["image", "video", "sound"]) -> None:
    """400 if the model that is served makes something else."""
    if info.output != what:
        raise invalid("model", f"this model makes {_MAKES[info.output]}", "unsupported_model")


def match_pictures(body: Body, info: ModelInfo, field: str) -> dict[str, list[Source]]:
    """The pictures of a body, by the pipeline's arguments and masks last, before any is decoded.

    ApiError for one that the model does not take, one too many, or one that it needs; `field` is the route's name of a
    picture.
    """
    found: dict[str, list[Source]] = {}
    for source in body.sources:
        meant = _MEANT.get(source[0], source[0])
        argument = next((name for name in _ARGUMENTS[meant] if name in info.pictures), None)
        if argument is None:
            kind = "mask" if meant == "mask" else "picture" if meant == "image" else "control picture"
            raise invalid(source[0], f"this model takes no {kind}", "unsupported_parameter")
        found.setdefault(argument, []).append(source)
        if len(found[argument]) > 1 and not info.pictures[argument].several:
            raise invalid(source[0], f"this model takes one picture as {source[0]}, got several")
        body.names[argument] = source[0]
    for argument, picture in info.pictures.items():
        if picture.needed and argument not in found:
            if argument == "image":
                raise invalid(field, "this model needs a picture: send one as a file or a data URL")
            name = "mask" if "mask" in argument else argument
            raise invalid(name, f"this model needs a {name.replace('_', ' ')} beside the prompt")
    return {argument: found[argument] for argument in info.pictures if argument in found}


def _parameters(
    request: BaseRequest, info: ModelInfo, limits: Limits, width: int | None, height: int | None
) -> dict[str, Any]:
    """The sampling parameters that pictures, videos and sounds share."""
    _at_most(limits.max_steps, num_inference_steps=request.num_inference_steps)
    _at_most(limits.request_timeout_s, timeout_s=request.timeout_s)
    if abs(priority := request.priority or 0) > (most := limits.most_priority):
        raise invalid("priority", f"priority must be between -{most} and {most}, got {priority}")
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
    """`values`; one that the model's pipeline does not have is refused, not dropped, unless it asks for nothing."""
    for name, value in values.items():
        if value is not None and name not in info.parameters and (name, value) != ("true_cfg_scale", 1):
            raise invalid(name, f"this model has no {name}", "unsupported_parameter")
    return {name: value for name, value in values.items() if value is None or name in info.parameters}


def _at_most(limit: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value > limit:
            raise invalid(name, f"{name} must be at most {limit:g}, got {value:g}")


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
        if not (match := _SIZE.fullmatch(request.size or "")) or 0 in map(int, match.groups()):
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
        larger = "width" if request.width and (width >= height or not request.height) else "height"
        sent = field or (larger if request.width or request.height else "size")
        raise invalid(sent, f"a picture may have at most {limits.max_pixels} pixels, {width}x{height} are more")
    return width, height


def _fitted(picture: Image.Image | Sent, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(picture.image() if not isinstance(picture, Image.Image) else picture, size)


def _area(info: ModelInfo) -> int:
    """Pixels that the model is made for."""
    return int(info.defaults.get("width") or 1024) * int(info.defaults.get("height") or 1024)


def _size_like(picture: Image.Image | Sent, info: ModelInfo) -> tuple[int, int]:
    """The picture's own size, rounded down; scaled if it has more pixels than the model is made for."""
    if picture.width * picture.height > _area(info):
        return _same_shape(picture, info)
    step = info.size_multiple
    return max(step, picture.width // step * step), max(step, picture.height // step * step)


def _same_shape(picture: Image.Image | Sent, info: ModelInfo) -> tuple[int, int]:
    """The picture's shape, with as many pixels as the model is made for."""
    scale, step = math.sqrt(_area(info) / (picture.width * picture.height)), info.size_multiple
    return max(step, round(picture.width * scale / step) * step), max(step, round(picture.height * scale / step) * step)


def _frames(request: VideoRequest, info: ModelInfo, limits: Limits) -> int:
    """As many as were asked for, or as come nearest to the seconds, or the model's own."""
    multiple, name = info.frame_multiple, "num_frames"
    if request.num_frames is not None:
        frames = request.num_frames
        if (frames - 1) % multiple:
            nearest = _nearest(frames, multiple)
            raise invalid("num_frames", f"num_frames must be a multiple of {multiple} plus 1, e.g. {nearest}")
    elif request.seconds is not None:
        name, given = "seconds", request.seconds
        seconds = f"{given:.3f}" if isinstance(given, float) else str(given)
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
