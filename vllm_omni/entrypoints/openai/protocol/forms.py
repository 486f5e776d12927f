"""Multipart bodies: bracket keys (`cache[threshold]`), JSON in strings, and pictures. Knows no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.protocol.requests import load_json

PICTURES = ("image", "image[]")
MASKS = ("mask", "mask_image")
URLS = ("url", "url[]")
MAX_FIELDS = 200
MAX_FIELD_BYTES = 8 * 2**20
_KEY = re.compile(r"([A-Za-z_]\w{0,63})((?:\[\w{0,64}\]){0,4})")
_AS_JSON = ("cache", "lora", "lora_request")


@dataclass(frozen=True)
class Form:
    """Fields as a JSON body would have them, and the bytes (or data URLs) of the pictures."""

    fields: dict[str, Any] = field(default_factory=dict)
    pictures: list[bytes] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)


def body_schema(
    kind: type[BaseModel], media: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The request body of a route's description; `required` and `optional` are files."""
    schema = kind.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in (*required, *optional)}
    schema["properties"] = files | schema["properties"]
    schema["required"] = [*required, *schema.get("required", ())]
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


async def read_form(
    http: Request, max_pictures: int, pictures: tuple[str, ...] = PICTURES, urls: tuple[str, ...] = URLS
) -> Form:
    """ApiError for a body that is no multipart form, or has too many parts. No part's name ever names a file.

    `pictures` and `urls`: the names that parts with pictures, or with data URLs of them, may have.
    """
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "the body must be multipart/form-data", "invalid_request")
    form = Form()
    try:
        async with http.form(max_files=max_pictures + 1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as got:
            for key, value in got.multi_items():
                if isinstance(value, UploadFile):
                    _keep(form, key, await value.read(), pictures)
                elif key in urls or (key in pictures and value.startswith("data:")):
                    form.urls.append(value)
                else:
                    _set(form.fields, key, value)
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}", "invalid_request") from None
    except (KeyError, ValueError):
        raise ApiError(400, "the form cannot be read", "invalid_request") from None
    if len(form.pictures) + len(form.urls) > max_pictures:
        raise invalid(pictures[0], f"at most {max_pictures} pictures")
    return form


def _keep(form: Form, key: str, data: bytes, pictures: tuple[str, ...]) -> None:
    masks = MASKS if pictures == PICTURES else ()
    if key in pictures:
        form.pictures.append(data)
    elif key in masks:
        form.masks.append(data)
    else:
        names = " or ".join([*pictures, *masks[:1]])
        raise invalid(key[:100], f"{key[:100]!r} is no name of a picture; send {names}", "unknown_parameter")


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
