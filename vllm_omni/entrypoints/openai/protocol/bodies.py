"""Bodies of requests: a JSON object, or a form with bracket keys (`cache[threshold]`), JSON in strings and pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.protocol.requests import load_json, parse_json

MAX_FIELDS = 200
MAX_FIELD_BYTES = 8 * 2**20
Source = tuple[str, Any]  # the client's name of a picture, and its bytes or URL
_KEY = re.compile(r"([A-Za-z_]\w{0,63})((?:\[\w{0,64}\]){0,4})")
_AS_JSON = ("cache", "lora", "lora_request")


@dataclass(frozen=True)
class Body:
    """Fields as JSON has them, and pictures; `strict`: the client's types are known, as in JSON."""

    fields: dict[str, Any]
    strict: bool
    sources: list[Source] = field(default_factory=list)

    def take(self, *names: str) -> list[Source]:
        """The pictures of these names."""
        return [source for source in self.sources if source[0] in names]


def body_schema(
    kind: type[BaseModel], media: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The request body of a route's description; `required` and `optional` are files."""
    schema = kind.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in (*required, *optional)}
    schema["properties"] = files | schema["properties"]
    schema["required"] = [*required, *schema.get("required", ())]
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


async def read_json(http: Request, pictures: tuple[str, ...] = ()) -> Body:
    """ApiError for a body that is no JSON object. `pictures`: names of fields that hold URLs of pictures."""
    return _body(parse_json(await http.body()), [], pictures, strict=True)


async def read_form(http: Request, max_pictures: int, pictures: tuple[str, ...]) -> Body:
    """ApiError for a body that is no multipart form, or has too many parts. No part's name ever names a file.

    `pictures`: the names that parts with pictures, or with URLs of them, may have.
    """
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "the body must be multipart/form-data", "invalid_request")
    fields: dict[str, Any] = {}
    sources: list[Source] = []
    try:
        async with http.form(max_files=max_pictures + 1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as got:
            for key, value in got.multi_items():
                name = key.removesuffix("[]")
                if name in pictures:
                    sources.append((name, await value.read() if isinstance(value, UploadFile) else value))
                elif isinstance(value, UploadFile):
                    names = " or ".join(pictures)
                    raise invalid(
                        key[:100], f"{key[:100]!r} is no name of a picture; send {names}", "unknown_parameter"
                    )
                else:
                    _set(fields, key, value)
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}", "invalid_request") from None
    except (KeyError, ValueError):
        raise ApiError(400, "the form cannot be read", "invalid_request") from None
    return _body(fields, sources, pictures, strict=False)


def _body(fields: dict[str, Any], sources: list[Source], pictures: tuple[str, ...], *, strict: bool) -> Body:
    """Pictures that are among the fields, as `URL` or `{"image_url": URL}`, become sources."""
    for name in pictures:
        value = fields.pop(name, None)
        if isinstance(value, dict):
            if set(value) != {"image_url"}:
                raise invalid(name, f"{name} takes image_url alone; no files are kept", "unsupported_parameter")
            value = value["image_url"]
        if value is not None:
            sources.append((name, value))
    return Body(fields, strict, sources)


def _set(fields: dict[str, Any], key: str, value: str) -> None:
    """`a` -> a, `a[b]` -> {"a": {"b": …}}, `a[]` -> list; `a[][b]` -> list of dicts, a new one if b is there."""
    if not (match := _KEY.fullmatch(key)):
        raise invalid(key[:100], "a name is a word, with [keys] after it", "unknown_parameter")
    path = [match[1], *re.findall(r"\[(\w*)\]", match[2])]
    if len(path) == 1:
        if path[0] in fields:
            raise invalid(path[0], "is given twice")
        fields[path[0]] = _json(path[0], value) if path[0] in _AS_JSON else value
        return
    here: Any = fields
    for name, following in zip(path, [*path[1:], None], strict=True):
        fresh: Any = _scalar(value) if following is None else [] if following == "" else {}
        if isinstance(here, list):
            if following is None or not here or not isinstance(here[-1], dict) or following in here[-1]:
                here.append(fresh)
            here = here[-1]
        elif isinstance(here, dict) and name:
            if following is None and name in here:
                raise invalid(key[:100], "is given twice")
            here = here.setdefault(name, fresh)
        else:
            raise invalid(key[:100], "contradicts another field of the form")
        if following is not None and not isinstance(here, list if following == "" else dict):
            raise invalid(key[:100], "contradicts another field of the form")


def _scalar(text: str) -> Any:
    """Inside brackets the client's types are lost: what reads as a number or truth value is one."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text) if len(text) < 40 else text
        except ValueError:
            continue
    return text


def _json(name: str, text: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return load_json(text)
    except (ValueError, RecursionError):
        raise invalid(name, f"{name} looks like JSON and is none") from None
