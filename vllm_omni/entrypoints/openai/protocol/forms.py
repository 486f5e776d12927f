"""From a form to fields: keys such as `cache[threshold]`, JSON in strings, pictures as files, URLs or JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vllm_omni.entrypoints.openai.protocol.bodies import (
    MULTIPART,
    NESTED,
    URLENCODED,
    Body,
    Meter,
    Source,
    as_body,
    load_json,
    media_type,
    too_large,
    wrong_type,
)
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.serve_config import Limits
from vllm_omni.errors import StoreError

MAX_FIELDS = 200
MAX_FIELD_BYTES = 8 * 2**20
_KEY = re.compile(r"([A-Za-z_]\w{0,63})((?:\[\w{0,64}\]){0,4})")
_PLACE = re.compile(r"\[[0-9]{0,3}\]$")  # of one of several pictures: `image[]`, or `image[0]` as PHP's clients count
_AS_JSON = ("cache", "lora", "lora_request", *NESTED)
Placed = tuple[tuple[str, ...], Any]  # the brackets after a name, and a value: `a[b][]=1` is (("b", ""), 1)


async def read_form(http: Request, limits: Limits, max_pictures: int, pictures: tuple[str, ...]) -> Body:
    """ApiError for a body that is no form, or has too many parts. No part's name ever names a file.

    `pictures`: the names that parts with pictures, with URLs of them, or with JSON that holds URLs may have.
    """
    kind = media_type(http)
    if kind not in (MULTIPART, URLENCODED):
        raise wrong_type(MULTIPART, kind)
    form = _Form(pictures, limits.max_json_bytes)
    try:
        if kind == URLENCODED:
            for key, text in await _urlencoded(http, limits):
                form.take(key, text)
        else:
            async with http.form(
                max_files=max_pictures + 1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
            ) as got:
                for key, value in got.multi_items():
                    form.take(key, await value.read() if isinstance(value, UploadFile) else value)
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}", "invalid_request") from None
    except OSError as error:  # large parts are kept in files while they come
        raise StoreError(f"uploads cannot be kept ({error.strerror})") from None
    except (KeyError, ValueError):
        raise ApiError(400, "the form cannot be read", "invalid_request") from None
    return as_body(http, form.fields(), form.sources, pictures, strict=False)


async def _urlencoded(http: Request, limits: Limits) -> list[tuple[str, str]]:
    """Keys and texts; letters beyond ASCII may be escaped or not, as `curl -d` sends them, and are UTF-8."""
    body = await http.body()
    if len(body) > limits.max_json_bytes:
        raise too_large("this form", limits.max_json_bytes, "send pictures as multipart/form-data")
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeDecodeError:
        raise ApiError(400, "a form must be in UTF-8", "invalid_request") from None
    except ValueError:
        raise ApiError(400, f"a form may have at most {MAX_FIELDS} fields", "invalid_request") from None


class _Form:
    """The parts of a form as they come; pictures apart."""

    def __init__(self, pictures: tuple[str, ...], max_json: int) -> None:
        self.sources: list[Source] = []
        self._pictures, self._meter = pictures, Meter(max_json)
        self._objects: dict[str, list[Any]] = {}  # of pictures, from JSON
        self._placed: dict[str, list[Placed]] = {}

    def take(self, key: str, value: str | bytes) -> None:
        """ApiError for a name that is none."""
        name = _PLACE.sub("", key)
        if name in self._pictures:
            given = _json(name, value, self._meter) if isinstance(value, str) else value
            if isinstance(given, str | bytes):
                self.sources.append((name, given))
            else:
                self._objects.setdefault(name, []).extend(given if isinstance(given, list) else [given])
        elif isinstance(value, bytes):
            names = " or ".join(self._pictures)
            raise invalid(key[:100], f"{key[:100]!r} is no name of a picture; send {names}", "unknown_parameter")
        else:
            if not (match := _KEY.fullmatch(key)):
                raise invalid(key[:100], "a name is a word, with [keys] after it", "unknown_parameter")
            name, path = match[1], tuple(re.findall(r"\[(\w*)\]", match[2]))
            read = _scalar(value) if path else _json(name, value, self._meter) if name in _AS_JSON else value
            self._placed.setdefault(name, []).append((path, read))

    def fields(self) -> dict[str, Any]:
        """ApiError for parts that contradict each other."""
        for name, given in self._objects.items():
            self._placed.setdefault(name, []).append(((), given))
        return {name: _together(name, name, placed) for name, placed in self._placed.items()}


def _together(field: str, key: str, placed: Sequence[Placed]) -> Any:
    """What the parts of one key say: `a[b]` makes a dict, `a[]` a list, `a[][b]` a list of dicts."""
    ends = sum(not path for path, _ in placed)
    if ends and len(placed) > 1:
        raise invalid(key[:100], "is given twice" if ends > 1 else "contradicts another field of the form")
    if ends:
        return placed[0][1]
    inner: dict[str, list[Placed]] = {}
    for (first, *rest), value in placed:
        inner.setdefault(first, []).append((tuple(rest), value))
    if "" not in inner:
        return {name: _together(field, f"{key}[{name}]", parts) for name, parts in inner.items()}
    if len(inner) > 1 or len({not path for path, _ in inner[""]}) > 1:
        raise invalid(key[:100], "contradicts another field of the form")
    return [_together(field, f"{key}[]", parts) for parts in _entries(field, inner[""])]


def _entries(field: str, placed: Sequence[Placed]) -> list[list[Placed]]:
    """The entries of a list: of `a[][b]` and `a[][c]`, the k-th of each belongs to the k-th entry.

    Where keys come in different numbers, an entry begins with a key that the one before it has; but where all parts of
    a key stand together, as the official client sends them, any entry may be the one that lacks a key.
    """
    paths = [path for path, _ in placed]
    if not paths[0]:
        return [[part] for part in placed]
    counts = Counter(paths)
    alike = len({*counts.values()}) == 1
    if not alike and len([*groupby(paths)]) == len(counts):
        raise invalid(field, f"{field} is ambiguous: not every entry has the same keys; send {field} as JSON text")
    entries: list[dict[tuple[str, ...], Any]] = []
    for path, value in placed:
        lacking = (entry for entry in (entries if alike else entries[-1:]) if path not in entry)
        if (entry := next(lacking, None)) is None:
            entries.append(entry := {})
        entry[path] = value
    return [list(entry.items()) for entry in entries]


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


def _json(name: str, text: str, meter: Meter) -> Any:
    """The value of a text that begins as an object or a list does; any other text itself."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        meter.take(data := text.encode())
        return load_json(data)
    except (ValueError, RecursionError):
        raise invalid(name, f"{name} looks like JSON and is none") from None
