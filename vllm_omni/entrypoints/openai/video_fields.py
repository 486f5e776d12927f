"""The fields of a video request, and what the engine is asked for them: frames, size, picture. Knows no jobs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from pydantic import Field

from vllm_omni.engine.interface import ModelInfo
from vllm_omni.engine.wire import MAX_FRAME_BYTES
from vllm_omni.entrypoints.openai.errors import invalid
from vllm_omni.entrypoints.openai.fields import CommonFields, ImageFields
from vllm_omni.entrypoints.openai.order import make_order
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

REFERENCE = "input_reference"
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?")


class VideoFields(CommonFields):
    """`POST /v1/videos`, all but its picture."""

    seconds: str | int | None = Field(default=None, description="How long; the frames nearest to it are made.")
    # ours
    num_frames: int | None = Field(default=None, ge=1, description="Instead of seconds.")
    fps: float | None = Field(default=None, ge=1, le=120, allow_inf_nan=False)
    guidance_scale_2: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)


@dataclass(frozen=True)
class VideoOrder:
    """One video as the engine makes it; `picture` has the video's size. `timeout_s` only where the client has one."""

    fields: VideoFields
    model: str
    params: OmniDiffusionSamplingParams
    seconds: str
    size: str
    picture: Image.Image | None

    @property
    def prompt(self) -> Any:
        if self.picture is None:
            return self.fields.prompt
        return {"prompt": self.fields.prompt, "multi_modal_data": {"image": self.picture}}


def make_video_order(
    fields: VideoFields, info: ModelInfo, config: ServeConfig, picture: Image.Image | None
) -> VideoOrder:
    """ApiError for what this model or this server does not do, before any work."""
    check_reference(picture is not None, info)
    given = fields.model_dump(exclude_none=True, include=set(CommonFields.model_fields))
    if picture is not None and not given.keys() & {"width", "height"} and fields.size in (None, "auto"):
        given |= _size_like(picture, info)
    order = make_order(ImageFields(**given), info, config)
    frames = _frames(fields, info, config)
    if frames * order.width * order.height * 3 > MAX_FRAME_BYTES * 0.99:  # it must cross from the engine's process
        raise invalid("size", f"{frames} frames of {order.size} are more than one request may have; ask for less")
    if fields.guidance_scale_2 is not None and ("guidance_scale_2" not in info.parameters or len(info.denoisers) < 2):
        raise invalid("guidance_scale_2", "is for models of two denoisers", "unsupported_parameter")
    fps = fields.fps or info.fps
    params = order.params[0].model_copy(
        update={"num_frames": frames, "fps": fps, "guidance_scale_2": fields.guidance_scale_2}
    )
    if picture is not None:
        picture = ImageOps.fit(picture, (order.width, order.height))
    seconds = f"{frames / fps:.3f}".rstrip("0").rstrip(".") if fields.seconds is None else str(fields.seconds)
    return VideoOrder(fields, order.model, params, seconds, order.size, picture)


def check_reference(given: bool, info: ModelInfo) -> None:
    """A picture for a model that begins with one, and for no other."""
    if info.image_input and not given:
        raise invalid(REFERENCE, "this model begins with a picture: send one as a file or a data URL")
    if given and not info.image_input:
        raise invalid(REFERENCE, "this model takes no picture", "unsupported_parameter")


def _frames(fields: VideoFields, info: ModelInfo, config: ServeConfig) -> int:
    """As many as were asked for, or as come nearest to the seconds, or the model's own."""
    multiple, name = info.frame_multiple, "num_frames"
    if fields.num_frames is not None:
        frames = fields.num_frames
        if fields.seconds is not None:
            raise invalid("num_frames", "seconds and num_frames say the same; give one of them")
        if (frames - 1) % multiple:
            raise invalid("num_frames", f"num_frames must be a multiple of {multiple} plus 1, e.g. "
                          f"{_nearest(frames, multiple)}")  # fmt: skip
    elif fields.seconds is not None:
        name, seconds = "seconds", str(fields.seconds)
        if not _SECONDS.fullmatch(seconds) or not float(seconds):
            raise invalid("seconds", 'seconds must be a number above 0, such as "4"')
        frames = _nearest(float(seconds) * (fields.fps or info.fps), multiple)
    else:
        frames = _nearest(info.defaults.get("num_frames") or 4 * info.fps, multiple)
    if frames > config.limits.max_frames:
        raise invalid(name, f"a video may have at most {config.limits.max_frames} frames, these are {frames}")
    return frames


def _nearest(frames: float, multiple: int) -> int:
    return multiple * max(0, round((frames - 1) / multiple)) + 1


def _size_like(picture: Image.Image, info: ModelInfo) -> dict[str, int]:
    """The picture's shape, with as many pixels as the model is made for."""
    area = int(info.defaults.get("width") or 1024) * int(info.defaults.get("height") or 1024)
    scale, step = math.sqrt(area / (picture.width * picture.height)), info.size_multiple
    return {
        name: max(step, round(side * scale / step) * step)
        for name, side in (("width", picture.width), ("height", picture.height))
    }
