"""The replies that routes return. The OpenAPI document is made of these classes too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.protocol.errors import ErrorDetail, ErrorReply

Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {"default": {"model": ErrorReply, "description": "An error."}}
STREAM: Responses = {200: {"content": {"text/event-stream": {}}}}
STREAM_OR_FILE: Responses = {
    200: {"content": {kind: {} for kind in ("text/event-stream", "image/png", "image/jpeg", "image/webp",
                                            "application/zip")}}}  # fmt: skip
OMIT_NONE = Field(exclude_if=lambda value: value is None)


class Reply(BaseModel):
    """Constants are defaults; a field that is `OMIT_NONE` is left out when it is None."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# ------------------------------------------------------------------------------------------------------------- pictures


class TokenDetails(Reply):
    text_tokens: int
    image_tokens: int


class Usage(Reply):
    """Latent tokens of all pictures, and tokens of the text as the text encoder read it."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class Picture(Reply):
    b64_json: str
    seed: int


class PictureFacts(Reply):
    """How one picture was made. `cache`: the settings used, without long curves."""

    image_index: int
    seed: int
    num_inference_steps: int
    computed_steps: int
    skipped_steps: int
    plan: list[int] | None
    cache: dict[str, Any] | Literal["off"]
    timings: Annotated[dict[str, float] | None, OMIT_NONE] = None


class Facts(Reply):
    """How the pictures of a request were made."""

    request_id: str
    model: str
    images: list[PictureFacts]
    warnings: list[str]


class ImagesReply(Reply):
    created: int
    data: list[Picture]
    size: str
    quality: str
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    usage: Usage
    safety_identifier: Annotated[str | None, OMIT_NONE] = None
    omni: Facts


# ----------------------------------------------------------------------------------------------------------------- chat


class ImageUrl(Reply):
    url: str


class Part(Reply):
    type: Literal["image_url"] = "image_url"
    image_url: ImageUrl


class Message(Reply):
    role: Literal["assistant"] = "assistant"
    content: list[Part]


class Choice(Reply):
    index: int = 0
    message: Message
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class ChatUsage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    omni: Facts


# --------------------------------------------------------------------------------------------------------------- videos


class VideoRecord(Reply):
    """What is known of a video job, in its reply and in the store."""

    id: str
    created_at: int
    model: str
    prompt: str
    seconds: str
    size: str
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    completed_at: int | None = None
    expires_at: int | None = None
    error: ErrorDetail | None = None


class VideoReply(VideoRecord):
    object: Literal["video"] = "video"
    progress: int
    remixed_from_video_id: None = None
    omni: dict[str, Any] = Field(description="The seed; once completed, frames, fps and steps.")


class VideoPage(Reply):
    object: Literal["list"] = "list"
    data: list[VideoReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Reply):
    id: str
    object: Literal["image.job", "video.deleted"]
    deleted: Literal[True] = True


# --------------------------------------------------------------------------------------------------------------- server


class Model(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllm-omni"
    root: str
    parent: Annotated[str | None, OMIT_NONE] = Field(default=None, description="Of an adapter: its model.")
    omni: dict[str, Any] = Field(description="Pipeline, defaults, capabilities, limits and cache settings.")


class Models(Reply):
    object: Literal["list"] = "list"
    data: list[Model]


class CacheReply(BaseModel):
    """And what the backend says of itself."""

    model_config = ConfigDict(extra="allow")

    object: Literal["omni.cache"] = "omni.cache"
    learning: str
    quality: dict[str, str | None]
    steps_computed: int
    steps_skipped: int
    skip_ratio: float
    bytes: int
    denoisers: dict[str, dict[str, Any]]
    recent: list[dict[str, Any]]


class Replica(Reply):
    """One of the engines behind a front; `lost` requests died with it and were asked again of another."""

    name: str
    state: Literal["ready", "asleep", "behind", "starting", "dead"]
    running: int
    waiting: int
    queued_cost_s: float
    answered: int
    lost: int
    restarts: int
    adapters: list[str]


class Replicas(Reply):
    object: Literal["list"] = "list"
    data: list[Replica]


class Sleeping(Reply):
    is_sleeping: bool
    level: int


class Condition(Sleeping):
    """The engine after an administrator's action."""

    success: Literal[True] = True
    message: str
    adapters: list[str]
    weights: str | None = Field(description="The folder of the last update; null: those that the model came with.")
    profiling: bool


class ModelInfo(Reply):
    """What is served, in SGLang's words."""

    model_path: str
    task_type: str = Field(description="T2I, I2I, TI2I, T2V, …: from text, a picture or either, to pictures or videos.")
    pipeline_name: str
    pipeline_class: str
    num_gpus: int = 1


class ServerAdapters(Reply):
    """The adapters that requests run with which name none."""

    status: Literal["ok"] = "ok"
    message: str
    active: list[dict[str, Any]]


class ListedAdapters(Reply):
    loaded_adapters: list[dict[str, str]]
    active: dict[str, list[dict[str, Any]]]


class Version(Reply):
    version: str
