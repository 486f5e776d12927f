"""The fields of every request: the official ones, ours, and what each may be. Knows no engine and no sockets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from vllm_omni.inputs.data import MAX_FPS

MAX_ENTRIES = 1000  # of a curve, mask or other list inside `cache` or `lora`
MAX_ADAPTERS = 16
MAX_DEPTH = 4
MAX_MESSAGES = 256
INPUT_REFERENCE = "input_reference"
# What a quality stands for if the request names no cache; None: the server's own setting.
QUALITY_CACHE: dict[str, str | None] = {"lossless": "off", "max": "off", "hd": "off", "xhigh": "high",
                                        "high": "high", "auto": None, "standard": None, "medium": "balanced",
                                        "low": "fast"}  # fmt: skip


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain the NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """Refuse what is too much, or could not cross to the engine: only `cache` and `lora` hold values of any kind."""
    if isinstance(value, dict | list | str) and len(value) > MAX_ENTRIES:
        raise ValueError(f"may have at most {MAX_ENTRIES} entries")
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        raise ValueError(f"may be nested {MAX_DEPTH} deep at most")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("must hold numbers of at most 64 bits")
    if isinstance(value, str):
        _text(value)
    elif isinstance(value, dict | list):
        for entry in [*value, *value.values()] if isinstance(value, dict) else value:
            _plain(entry, depth + 1)
    return value


def _few(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_ADAPTERS:
        raise ValueError(f"may name at most {MAX_ADAPTERS} adapters")
    return value


def _as_jpeg(value: Any) -> Any:
    """`jpg` is another name of the format."""
    return "jpeg" if value == "jpg" else value


Text = Annotated[str, AfterValidator(_text)]
Plain = AfterValidator(_plain)
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # the operator's limits are lower, and are told by name


class BaseRequest(BaseModel):
    """What a request may say, whatever it makes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    prompt: Annotated[Text, AfterValidator(_not_blank)] = Field(min_length=1, description="What to draw.")
    model: Text | None = Field(default=None, max_length=512, description="A name that is served; default: the first.")
    size: str | None = Field(default=None, max_length=32, description="WIDTHxHEIGHT, or auto: the model's own.")
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd", "lossless"] | None = None
    user: Text | None = Field(default=None, max_length=512)
    safety_identifier: Text | None = Field(default=None, max_length=512)
    # ours
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    num_inference_steps: Count | None = None
    guidance_scale: Scale | None = None
    true_cfg_scale: Scale | None = None
    negative_prompt: Text | None = None
    width: Count | None = None
    height: Count | None = None
    cache: Annotated[str | dict[str, Any] | None, Plain] = Field(
        default=None, description="off, a preset, or settings by name."
    )
    lora: Annotated[str | dict[str, Any] | list[Any] | None, AfterValidator(_few), Plain] = Field(
        default=None, description="Names of adapters that are loaded."
    )
    priority: int | None = None
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class ImageRequest(BaseRequest):
    """`POST /v1/images/generations`, and all of `/v1/images/edits` but its pictures."""

    n: Count | None = Field(default=None, description="Pictures; the i-th has the seed seed + i.")
    background: Literal["transparent", "opaque", "auto"] | None = None
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, BeforeValidator(_as_jpeg)] = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    response_format: Literal["b64_json", "file", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None
    # ours
    strength: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    include_timings: bool | None = None
    stream_progress: bool | None = Field(default=None, description="Progress events between the partial images.")


class VideoRequest(BaseRequest):
    """`POST /v1/videos`, all but its picture."""

    seconds: str | int | float | None = Field(default=None, description="How long; the frames nearest to it are made.")
    # ours
    num_frames: Count | None = Field(default=None, description="Instead of seconds.")
    fps: float | None = Field(default=None, ge=1, le=MAX_FPS, allow_inf_nan=False)
    guidance_scale_2: Scale | None = None
    boundary_ratio: float | None = Field(default=None, ge=0, le=1, description="Where a second expert takes over.")


class SoundRequest(BaseRequest):
    """`POST /v1/audio/generate`: a text, and how long."""

    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="How long.")
    response_format: Literal["wav", "flac"] | None = None


_MESSAGES: dict[str, Any] = {
    "items": {"type": "object", "required": ["role", "content"], "properties": {"role": {"type": "string"}}}
}


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`: its messages, what has no effect on a picture, and any field of an image request."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra=_MESSAGES)
    temperature: Any = None
    top_p: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logprobs: Any = None
    stop: Any = None
    stream_options: dict[str, Any] | None = None
    modalities: Any = None
    response_format: Any = None
    metadata: Any = None
    store: Any = None
    audio: Any = None
    chat_template_kwargs: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    min_p: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    repetition_penalty: Any = None
    service_tier: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_k: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None


# What a client may expect to be acted on; the others only tune a language model.
ABOUT_WORDS = ("audio", "function_call", "functions", "prediction", "tools", "web_search_options")
