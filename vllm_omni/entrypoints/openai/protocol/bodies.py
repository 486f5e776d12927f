"""From the JSON of a body, or the fields of a form (`forms.py`), to a checked request and its pictures."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.protocol.requests import BaseRequest
from vllm_omni.entrypoints.serve_config import Limits, ServeConfig
from vllm_omni.errors import UnknownKeyError

_PICTURE, _HEAD, _METERED = b"data:", 8, 2**16
_MAX_QUOTES = 100_000  # of a JSON text that is larger than one without pictures may be
ALIASES = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "lora_request": "lora",
    "num_outputs_per_prompt": "n",
    "num_images_per_prompt": "n",
    "return_stage_metrics": "include_timings",
}
NOT_HERE = ("complexity", "frame_count", "frame_duration_ms", "svg", "markup", "input_fidelity")
NESTED = ("extra_body", "extra_params")  # objects whose fields mean what they mean outside
# What clients of other servers send always: taken, and named in the reply's warnings, unless it asks for nothing.
NO_MEANING = {
    "bot_task": "it is for another family of models",
    "enable_teacache": "the field cache chooses the cache",
    "flow_shift": "the scheduler is the model's own",
    "fps": "this model makes pictures",
    "generator_device": "random numbers are drawn on the CPU",
    "num_frames": "this model makes pictures",
    "output_path": "files are written where the operator says",
    "return_stage_metrics": "timings are told of pictures",
    "style": "it has no meaning for this model",
    "sys_type": "it is for another family of models",
    "system_prompt": "it is for another family of models",
    "vae_use_slicing": "it is a flag of the server",
    "vae_use_tiling": "it is a flag of the server",
    "use_system_prompt": "it is for another family of models",
}
_BESIDE_A_NAME = {"local_path", "lora_path", "path", "int_id", "lora_int_id"}  # in an object of `lora`
_NOTHING = (None, False, "", "false", "False", "cpu")
MULTIPART, URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
# What is wrong with a value that is then shown. A prompt never is: errors are in the log.
_SHOWN = {f"{kind}_{what}" for kind in ("int", "float", "bool") for what in ("type", "parsing")} | {"literal_error"}
_MAX_SHOWN = 60
Source = tuple[str, Any]  # the client's name of a picture, and its bytes or URL
R = TypeVar("R", bound=BaseRequest)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Body:
    """Fields as JSON has them, and pictures; `strict`: the client's types are known, as in JSON.

    `names` are the client's names of fields that have another one here, `warnings` what was taken without effect.
    """

    fields: dict[str, Any]
    strict: bool = False
    sources: list[Source] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def body_schema(
    kind: type[BaseModel],
    media: str,
    required: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    needed: bool = True,
) -> dict[str, Any]:
    """The request body of a route's description; `required` and `optional` are files."""
    schema = kind.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in (*required, *optional)}
    schema["properties"] = files | schema["properties"]
    schema["required"] = [*required, *schema.get("required", ())]
    return {"requestBody": {"required": needed, "content": {media: {"schema": schema}}}}


async def read_json(http: Request, limits: Limits, pictures: tuple[str, ...] = (), *, curl: bool = False) -> Body:
    """ApiError for a body that is no JSON object. `pictures`: names of fields that hold URLs of pictures.

    `curl`: JSON may also be called a form, as `curl -d` calls whatever it sends.
    """
    kind = media_type(http) or "application/json"
    if kind != "application/json" and not (curl and kind == URLENCODED):
        raise wrong_type("application/json", kind)
    return as_body(http, parse_json(await read_text(http, limits)), [], pictures, strict=True)


def media_type(http: Request) -> str:
    """The body's, without parameters and in small letters; empty if the client names none."""
    return http.headers.get("content-type", "").partition(";")[0].strip().lower()


def wrong_type(wanted: str, got: str) -> ApiError:
    """A 400 that says which header to send."""
    return ApiError(400, f"send the body with Content-Type: {wanted}, got {got[:100]!r}", "invalid_request")


async def read_text(http: Request, limits: Limits) -> bytes:
    """A body of JSON; ApiError as soon as it has too much besides pictures."""
    meter, parts = Meter(limits.max_json_bytes), []
    async for part in http.stream():
        meter.take(part)
        parts.append(part)
    return b"".join(parts)


def as_body(
    http: Request, fields: dict[str, Any], sources: list[Source], pictures: tuple[str, ...], *, strict: bool
) -> Body:
    """Nested fields are taken out; pictures among the fields, as `URL`, `{"image_url": URL}` or a list, are sources.

    `sources` has those that were found already; of one name, all must come in the same way.
    """
    for outer in NESTED:
        nested = fields.pop(outer, None) or {}
        if not isinstance(nested, dict):
            raise invalid(outer, f"{outer} must be an object of fields")
        for key, value in nested.items():
            if key in fields:
                raise invalid(key[:100], f"is given twice: in the body and in {outer}")
            fields[key] = value
    for name in pictures:
        given = fields.pop(name, None)
        if given is not None and any(name == other for other, _ in sources):
            raise invalid(name, f"{name} is given twice: as a file or a URL, and as an object with image_url")
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, dict):
                if set(value) != {"image_url"}:
                    raise invalid(name, f"{name} takes image_url alone; no files are kept", "unsupported_parameter")
                value = value["image_url"]
            if value is not None:
                sources.append((name, value))
    body = Body(fields, strict, sources)
    http.state.names, http.state.warnings = body.names, body.warnings
    return body


def check_request(
    kind: type[R],
    body: Body,
    config: ServeConfig,
    adapters: Collection[str],
    unless_named: Sequence[tuple[str, float]] = (),
) -> R:
    """Fields as given, as a request of that kind; ApiError for the first that is wrong.

    One of the `adapters` that are loaded may be named as the model; those of a request that names none are
    `unless_named`, with their scales.
    """
    values: dict[str, Any] = {}
    for key, value in body.fields.items():
        name = ALIASES.get(key, key)
        if name in NOT_HERE:
            if value is None:
                continue
            raise invalid(key[:100], f"{key} is not supported by this server", "unsupported_parameter")
        if key in NO_MEANING and (key == "style" or name not in kind.model_fields) and value not in _NOTHING:
            body.warnings.append(f"{key} was ignored: {NO_MEANING[key]}")
        if name not in kind.model_fields:
            if key in NO_MEANING or config.allow_unknown_fields or (name == "n" and value in (None, 1, "1")):
                continue
            known = [*kind.model_fields, *(alias for alias, ours in ALIASES.items() if ours in kind.model_fields)]
            raise invalid(key[:100], str(UnknownKeyError("the request", key[:100], known)), "unknown_parameter")
        if name in values and values[name] != value:
            raise invalid(key, f"{key} and {name} mean the same and differ; give one")
        values[name] = _named_adapters(value, key, body) if name == "lora" else value
        if name != key:
            body.names[name] = key
        if name == "lora":
            body.names["lora_request"] = key  # the engine's name
    if values.get("num_frames") is not None and values.pop("seconds", None) is not None:
        body.warnings.append("seconds was ignored: num_frames says how long")
    if values.get("model") is None:
        values["model"] = config.model_names[0]
    request = validate(kind, values, strict=body.strict)
    limit = config.limits.max_prompt_characters
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limit:
            raise invalid(name, f"{name} has {len(text)} characters, at most {limit} are taken")
    check_model(request.model, config, adapters)
    if request.model in adapters:
        if request.lora not in (None, request.model):
            raise invalid("lora", "the model named is an adapter already; name the model, and all adapters as lora")
        request = request.model_copy(update={"lora": request.model})
    elif request.lora is None and unless_named:
        request = request.model_copy(update={"lora": [{"name": name, "scale": scale} for name, scale in unless_named]})
    return request


def _named_adapters(value: Any, key: str, body: Body) -> Any:
    """Adapters without what upstream's clients send beside their names, which alone choose an adapter here."""
    listed = value if isinstance(value, list) else [value]
    named = [entry for entry in listed if isinstance(entry, dict) and entry.get("name")]
    for extra in sorted({name for entry in named for name in _BESIDE_A_NAME & entry.keys() if entry[name]}):
        body.warnings.append(f"{key}.{extra} was ignored: an adapter that is loaded is chosen by its name")
    plain = [
        {name: part for name, part in entry.items() if name not in _BESIDE_A_NAME}
        if isinstance(entry, dict) and entry.get("name")
        else entry
        for entry in listed
    ]
    return plain if isinstance(value, list) else plain[0]


def validate(kind: type[M], values: dict[str, Any], *, strict: bool) -> M:
    """ApiError for the first field that is wrong."""
    try:
        return kind.model_validate(values, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name, value = str(first["loc"][0]), first["input"]
        wrong = f", got {value!r}" if type(value) in (int, float, bool) or first["type"] in _SHOWN else ""
        raise invalid(name, f"{name}: {first['msg'].removeprefix('Value error, ')}{wrong[:_MAX_SHOWN]}") from None


def check_model(name: str | None, config: ServeConfig, adapters: Collection[str]) -> None:
    """404 for a model, or an adapter, that is not served here."""
    served = [*config.model_names, *adapters]
    if name is not None and name not in served:
        text = f"model {name[:100]!r} is not served here; it has: {', '.join(served)}"
        raise ApiError(404, text, "model_not_found", "model")


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object; no NaN, no key twice, no depth that breaks a parser."""
    try:
        value = load_json(body)
    except (ValueError, RecursionError) as error:
        where = f": {error}" if body and isinstance(error, json.JSONDecodeError) else ""  # it quotes nothing
        raise ApiError(400, f"the body must be a JSON object in UTF-8{where}", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return value


def load_json(text: bytes) -> Any:
    """ApiError that names the key for a key that is there twice, or is NaN or Infinity; ValueError, RecursionError."""
    return json.loads(text, parse_constant=_Constant, object_pairs_hook=_checked)


class Meter:
    """Lets a JSON text pass, part by part, whose bytes besides pictures are at most `most`.

    Parsing holds the interpreter, in whatever thread. Pictures are strings that begin with `data:`, or follow
    `"image":`.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._plain, self._quotes = most, 0, 0, 0
        self._key = self._colon = self._text = b""  # how the last three pieces between quotes begin

    def take(self, part: bytes) -> None:
        """ApiError once it is too much."""
        for start in range(0, len(part), _METERED):
            self._count(part[start : start + _METERED])
            if self._taken > self._most and (self._quotes > _MAX_QUOTES or self._plain > self._most):
                raise too_large("JSON", self._most, "besides pictures as data: URLs")

    def _count(self, part: bytes) -> None:
        self._taken += len(part)
        for number, piece in enumerate(part.split(b'"')):
            if number:
                self._quotes += 1
                self._key, self._colon, self._text = self._colon, self._text, b""
            self._text += piece[: _HEAD - len(self._text)]
            named = self._key == b"image" and self._colon.strip() == b":"
            if not named and not self._text.startswith(_PICTURE):
                self._plain += len(piece)


def too_large(what: str, most: int, more: str) -> ApiError:
    return ApiError(413, f"{what} may have at most {most} bytes; {more}", "request_too_large")


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
