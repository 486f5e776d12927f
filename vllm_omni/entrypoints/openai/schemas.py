"""What replies look like, for `/openapi.json` alone: routes build plain dicts, and the fuzz test compares the two."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Responses = dict[int | str, dict[str, Any]]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Reply):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(_Reply):
    error: Error


class Details(_Reply):
    text_tokens: int
    image_tokens: int


class Usage(_Reply):
    input_tokens: int
    input_tokens_details: Details
    output_tokens: int
    output_tokens_details: Details
    total_tokens: int


class Picture(_Reply):
    b64_json: str
    seed: int


class PictureFacts(_Reply):
    image_index: int
    seed: int
    num_inference_steps: int
    computed_steps: int
    skipped_steps: int
    plan: list[int] | None
    cache: dict[str, Any] | Literal["off"]
    timings: dict[str, float] = {}


class Facts(_Reply):
    request_id: str
    model: str
    images: list[PictureFacts]
    warnings: list[str]


class ImagesReply(_Reply):
    created: int
    data: list[Picture]
    size: str
    quality: str
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    usage: Usage
    safety_identifier: str = ""
    omni: Facts


class DataUrl(_Reply):
    url: str


class Part(_Reply):
    type: Literal["image_url"]
    image_url: DataUrl


class Message(_Reply):
    role: Literal["assistant"]
    content: list[Part]


class Choice(_Reply):
    index: int
    message: Message
    finish_reason: Literal["stop"]
    logprobs: None


class ChatUsage(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(_Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    omni: Facts


class Deleted(_Reply):
    id: str
    object: Literal["image.job", "video.deleted"]
    deleted: Literal[True]


class Model(_Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    omni: dict[str, Any]


class Models(_Reply):
    object: Literal["list"]
    data: list[Model]


class Cache(BaseModel):
    """And what the backend tells of itself."""

    object: Literal["omni.cache"]
    quality: dict[str, str | None]
    steps_computed: int
    steps_skipped: int
    skip_ratio: float
    bytes: int
    recent: list[dict[str, Any]]


class Version(_Reply):
    version: str


class VideoReply(_Reply):
    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: None
    error: Error | None
    omni: dict[str, Any]


class VideoPage(_Reply):
    object: Literal["list"]
    data: list[VideoReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


ERRORS: Responses = {"default": {"model": ErrorReply, "description": "An error."}}


def replies(model: type[BaseModel], *, streams: bool = False) -> Responses:
    """For a route's `responses`; `streams`: server-sent events instead, where the client asked for them."""
    events: dict[str, Any] = {"content": {"text/event-stream": {}}} if streams else {}
    return {200: {"model": model, **events}}
