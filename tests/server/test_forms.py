"""Forms as fields: letters beyond ASCII, lists of objects in every order, pictures as JSON; read without a server."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote_plus

import httpx
import pytest
from openai import OpenAI
from starlette.requests import Request

from vllm_omni.entrypoints.openai.protocol.bodies import Body
from vllm_omni.entrypoints.openai.protocol.errors import ApiError
from vllm_omni.entrypoints.openai.protocol.forms import MAX_FIELDS, read_form
from vllm_omni.entrypoints.serve_config import Limits

PICTURES = ("image", "images", "mask")
URLENCODED = "application/x-www-form-urlencoded"
URL = "data:image/png;base64,AAAA"
BOTH = [{"name": "a", "scale": 0.5}, {"name": "b", "scale": 0.25}]


async def read(content: bytes, kind: str = URLENCODED, limits: Limits | None = None) -> Body:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())], "state": {}}
    return await read_form(Request(scope, receive), limits or Limits(), 4, PICTURES)


async def multipart(*parts: tuple[str, Any], limits: Limits | None = None) -> Body:
    """`parts`: names with texts, or with bytes of a file."""
    files = [(name, ("a.png", value) if isinstance(value, bytes) else (None, value)) for name, value in parts]
    sent = httpx.Request("POST", "http://x", files=files)
    return await read(sent.read(), sent.headers["content-type"], limits)


# ---------------------------------------------------------------------------------------------------------- urlencoded


@pytest.mark.parametrize("text", ["一只猫", "naïve + café & 50 %", "", "👩‍👧", "a=b;c"])
async def test_a_form_is_in_utf_8_escaped_or_not(text: str) -> None:
    raw = text.replace("%", "%25").replace("+", "%2B").replace("&", "%26").encode()
    for content in (b"prompt=" + raw + b"&seed=1", f"seed=1&prompt={quote_plus(text)}".encode()):
        assert (await read(content)).fields == {"prompt": text, "seed": "1"}


async def test_a_plain_form_may_be_named_in_any_letters() -> None:
    assert (await read(b"prompt=x", URLENCODED.title() + "; charset=UTF-8")).fields == {"prompt": "x"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt=ä".encode("latin-1"), "UTF-8"),
        (b"prompt=%E4", "UTF-8"),
        (b"&".join(b"a%d=1" % i for i in range(MAX_FIELDS + 1)), "at most 200 fields"),
        (b"prompt=x&prompt=y", "given twice"),
        (b"a[b]=1&a[b]=2", "given twice"),
        (b"a[b]=1&a=2", "contradicts"),
        (b"a[b]=1&a[]=2", "contradicts"),
        (b"a[]=1&a[][b]=2", "contradicts"),
        (b"a[b=1", "a name is a word"),
        (b"cache={", "looks like JSON"),
    ],
)
async def test_a_form_that_cannot_be_read_is_a_400(content: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        await read(content)
    assert caught.value.status == 400


# ------------------------------------------------------------------------------------------------- dicts and lists


@pytest.mark.parametrize(
    ("parts", "lora"),
    [
        ("name=a scale=.5 name=b scale=.25", BOTH),
        ("name=a name=b scale=.5 scale=.25", BOTH),
        ("scale=.5 scale=.25 name=a name=b", BOTH),
        ("name=a scale=.5 name=b", [{"name": "a", "scale": 0.5}, {"name": "b"}]),
        ("name=a name=b scale=.5 name=c", [{"name": "a"}, {"name": "b", "scale": 0.5}, {"name": "c"}]),
        ("name=a scale=.5", [{"name": "a", "scale": 0.5}]),
        ("name=a name=b", [{"name": "a"}, {"name": "b"}]),
        ("name=a name=b scale=.5", None),
        ("scale=.5 name=a name=b", None),
    ],
)
async def test_a_list_of_objects_is_what_was_meant_or_refused(parts: str, lora: list[dict[str, Any]] | None) -> None:
    """Parts of one entry after the other, or as the official client sends them, key by key."""
    content = "&".join(f"lora[][{part.replace('=', ']=')}" for part in parts.split()).encode()
    if lora is not None:
        assert (await read(content)).fields == {"lora": lora}
        return
    with pytest.raises(ApiError, match=r"ambiguous.*send lora as JSON text") as caught:
        await read(content)
    assert (caught.value.status, caught.value.param) == (400, "lora")


async def test_dicts_lists_and_json_mean_the_same() -> None:
    wanted = {"cache": {"threshold": 0.1, "steps_mask": [1, 0], "deep": {"on": True}}, "lora": BOTH}
    brackets = b"cache[threshold]=0.1&cache[steps_mask][]=1&cache[steps_mask][]=0&cache[deep][on]=true&lora="
    assert (await read(brackets + json.dumps(BOTH).encode())).fields == wanted
    assert (await multipart(*((name, json.dumps(value)) for name, value in wanted.items()))).fields == wanted


async def test_the_official_clients_lists_of_objects() -> None:
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json={"created": 1, "data": []})

    client = OpenAI(base_url="http://x", api_key="k", http_client=httpx.Client(transport=httpx.MockTransport(answer)))

    async def edit(lora: list[dict[str, Any]]) -> Body:
        client.images.edit(image=b"png", prompt="x", extra_body={"lora": lora})
        return await read(sent[-1].read(), sent[-1].headers["content-type"])

    got = await edit(BOTH)
    assert got.fields == {"prompt": "x", "lora": BOTH} and got.sources == [("image", b"png")]
    with pytest.raises(ApiError, match="ambiguous"):
        await edit([{"name": "a", "scale": 0.5}, {"name": "b"}])


# ------------------------------------------------------------------------------------------------- pictures as JSON


@pytest.mark.parametrize(
    ("parts", "sources"),
    [
        ([("image", f'{{"image_url": "{URL}"}}')], [("image", URL)]),
        ([("mask", f' {{"image_url": "{URL}"}}')], [("mask", URL)]),
        ([("images", f'[{{"image_url": "{URL}"}}, "{URL}"]')], [("images", URL)] * 2),
        ([("image[]", f'{{"image_url": "{URL}"}}')] * 2, [("image", URL)] * 2),
        ([("image[image_url]", URL)], [("image", URL)]),
        ([("images[][image_url]", URL)] * 2, [("images", URL)] * 2),
        ([("image", URL), ("image", b"png")], [("image", URL), ("image", b"png")]),
        ([("image", b"png"), ("mask", f'{{"image_url": "{URL}"}}')], [("image", b"png"), ("mask", URL)]),
    ],
)
async def test_a_picture_may_be_a_file_a_url_or_json(parts: list[tuple[str, Any]], sources: list[Any]) -> None:
    got = await multipart(*parts)
    assert got.sources == sources and got.fields == {}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("image", b"png"), ("image", f'{{"image_url": "{URL}"}}')], "image is given twice"),
        ([("image", f'{{"image_url": "{URL}"}}'), ("image[]", URL)], "image is given twice"),
        ([("image[image_url]", URL), ("image", b"png")], "image is given twice"),
        ([("image[image_url]", URL), ("image", f'{{"image_url": "{URL}"}}')], "contradicts"),
        ([("image", '{"file_id": "f"}')], "takes image_url alone"),
        ([("image", '{"image_url": ')], "looks like JSON and is none"),
        ([("other", b"png")], "no name of a picture"),
    ],
)
async def test_a_picture_given_in_two_ways_or_none_is_refused(parts: list[tuple[str, Any]], said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        await multipart(*parts)
    assert caught.value.status == 400


async def test_json_in_a_form_has_one_limit_for_all_of_it() -> None:
    """Pictures do not count."""
    part, limits = ("image[]", json.dumps(["x" * 600])), Limits(max_json_mb=1000 / 2**20)
    url = ("image[]", json.dumps({"image_url": "data:image/png;base64," + "A" * 5000}))
    assert len((await multipart(part, url, limits=limits)).sources) == 2
    with pytest.raises(ApiError, match="1000 bytes") as caught:
        await multipart(part, part, *[url] * 2, limits=limits)
    assert caught.value.status == 413
