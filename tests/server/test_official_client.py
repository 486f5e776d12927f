"""The official OpenAI client against the server: its types, streams, errors and retries, and the shipped examples."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from closeness import levels_apart
from http_replies import envelope, picture, run_example
from http_server import KEY, LONG, Running
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image
from pydantic import BaseModel
from waiting import until


def test_generate_returns_pictures_that_their_metadata_reproduces(openai: OpenAI) -> None:
    made = openai.images.generate(prompt="red apple", n=2, size="auto", extra_body={"seed": 7, "steps": 8})
    assert made.data and made.usage and made.size and len(made.data) == 2
    images = [picture(entry.b64_json) for entry in made.data]
    assert {f"{i.width}x{i.height}" for i in images} == {made.size}
    assert [entry.model_extra["seed"] for entry in made.data] == [7, 8]
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    told = json.loads(images[1].info["vllm_omni"])
    again = openai.images.generate(
        prompt=told["prompt"],
        size=told["size"],
        extra_body={"seed": told["seed"], "steps": told["num_inference_steps"]},
    )
    other = np.asarray(picture(again.data[0].b64_json), dtype=int)  # the second of two, alone
    assert levels_apart(images[1], other) <= 1
    assert np.ptp(other) > 50


def test_a_stream_has_previews_and_one_completed_event_per_picture(openai: OpenAI) -> None:
    events = list(
        openai.images.generate(
            prompt="red apple", n=2, stream=True, partial_images=2, extra_body={"seed": 1, "steps": 9, "cache": "off"}
        )
    )
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds.count("completed") == 2 and kinds.count("partial_image") == 4
    assert all(picture(event.b64_json).size for event in events)
    assert events[-1].usage.output_tokens > 0


async def test_the_async_client_reads_raw_replies(server: Running) -> None:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
        raw = await client.images.with_raw_response.generate(
            prompt="cat", quality="low", output_format="webp", output_compression=60, extra_body={"steps": 6}
        )
        made = raw.parse()
        assert raw.headers["x-request-id"] and made.quality == "low"
        assert picture(made.data[0].b64_json).format == "WEBP"
        assert made.model_extra["omni"]["images"][0]["cache"] != "off"
        with pytest.raises(NotFoundError):
            await client.images.generate(prompt="cat", model="dall-e-9")


EXTRA = {"seed", "omni"}  # what our replies have and the official types have not
STREAMED = {"generate": [ImageGenPartialImageEvent, ImageGenCompletedEvent],
            "edit": [ImageEditPartialImageEvent, ImageEditCompletedEvent]}  # fmt: skip


def extras(told: Any) -> set[str]:
    """Names of fields that the official types do not know, wherever they are."""
    found: set[str] = set()
    if isinstance(told, BaseModel):
        found |= set(told.model_extra or {})
        for name in told.model_fields_set - found:
            found |= extras(vars(told)[name])
    elif isinstance(told, list):
        for entry in told:
            found |= extras(entry)
    return found


def method(owner: Any, name: str) -> Any:
    return owner.generate if name == "generate" else owner.edit


@pytest.mark.slow
async def test_replies_have_the_official_types(server: Running, repainter: Running) -> None:
    """Generate, edit, streams of both, raw and streamed bodies; sync and async give the same type and picture."""
    body = {"seed": 3, "steps": 4, "cache": "off"}
    orange = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(orange, "PNG")
    for here, kind in ((server, "generate"), (repainter, "edit")):
        url, more = here.url + "/v1", {} if kind == "generate" else {"image": orange.getvalue()}
        asked: dict[str, Any] = {"prompt": "cat", "extra_body": body, **more}
        async with AsyncOpenAI(base_url=url, api_key=KEY) as later:
            now = OpenAI(base_url=url, api_key=KEY)
            make, make_later = method(now.images, kind), method(later.images, kind)
            made, made_later = make(**asked), await make_later(**asked)
            assert type(made) is type(made_later) is ImagesResponse
            assert made.data[0].b64_json == made_later.data[0].b64_json and extras(made) == EXTRA
            events = list(make(stream=True, partial_images=1, **asked))
            events_later = [event async for event in await make_later(stream=True, partial_images=1, **asked)]
            name = "image_generation" if kind == "generate" else "image_edit"
            kinds = [f"{name}.partial_image", f"{name}.completed"]
            assert [e.type for e in events] == [e.type for e in events_later] == kinds
            assert [type(e) for e in events] == [type(e) for e in events_later] == STREAMED[kind]
            assert extras(events) == {"omni"} and events[-1].b64_json == made.data[0].b64_json
            raw = method(now.images.with_raw_response, kind)(**asked)
            assert raw.parse().data[0].b64_json == made.data[0].b64_json and raw.retries_taken == 0
            with method(now.images.with_streaming_response, kind)(**asked) as streamed:
                assert json.loads(b"".join(streamed.iter_bytes()))["data"][0]["b64_json"] == made.data[0].b64_json


WRONG: list[tuple[dict[str, Any], type, int, str | None]] = [
    ({"prompt": ""}, BadRequestError, 400, "invalid_value"),
    ({"extra_body": {"sede": 1}}, BadRequestError, 400, "unknown_parameter"),
    ({"api_key": "wrong"}, AuthenticationError, 401, "invalid_api_key"),
    ({"model": "dall-e-9"}, NotFoundError, 404, "model_not_found"),
    ({"prompt": "x" * (3 << 20)}, APIStatusError, 413, "request_too_large"),
    ({"n": 10, "extra_body": LONG}, InternalServerError, 503, "queue_full"),
    ({"extra_body": LONG | {"timeout_s": 0.2}, "max_retries": 5}, InternalServerError, 504, "deadline_exceeded"),
    ({"extra_body": LONG, "timeout": 0.2}, APITimeoutError, 0, None),
    ({"base_url": "http://127.0.0.1:9/v1"}, APIConnectionError, 0, None),
]


def counted(server: Running, status: int, wanted: int) -> bool:
    """Whether there were so many replies; one to a body that is refused counts when the body has been read."""
    return server.app.state.omni.statuses[status] >= wanted


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[2]}-{case[3]}")
async def test_every_error_raises_its_official_class(
    server: Running, case: tuple[dict[str, Any], type, int, str]
) -> None:
    """In both clients; what is not worth a retry is asked once."""
    change, kind, status, code = case
    options = {"base_url": server.url + "/v1", "api_key": KEY, "max_retries": 0}
    options |= {name: change[name] for name in options if name in change}
    asked = {"prompt": "x"} | {name: value for name, value in change.items() if name not in options}
    for asynchronous in (False, True):
        before = server.app.state.omni.statuses[status]
        with pytest.raises(kind) as caught:
            if asynchronous:
                async with AsyncOpenAI(**options) as client:
                    await client.images.generate(**asked)
            else:
                OpenAI(**options).images.generate(**asked)
        assert type(caught.value) is kind
        if status:
            assert (caught.value.status_code, caught.value.code) == (status, code)
            assert caught.value.request_id and caught.value.body["message"]
            until(partial(counted, server, status, before + 1))
            assert server.app.state.omni.statuses[status] == before + 1
        server.idle()


@pytest.mark.alone
@pytest.mark.slow
def test_clients_retry_a_full_queue_until_they_are_served(server: Running) -> None:
    """More clients than places: each is told when to come back, does so, and none is lost or asks too often."""
    client = OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=40)

    def one(seed: int) -> Any:
        return client.images.with_raw_response.generate(
            prompt="cat", extra_body={"seed": seed, "steps": 30, "cache": "off"}
        )

    def asked_too_often() -> bool:
        before = server.app.state.omni.statuses[503]
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(one, range(16)))
        assert all(reply.parse().data[0].b64_json for reply in replies)
        retries = sum(reply.retries_taken for reply in replies)
        until(partial(counted, server, 503, before + retries))
        assert server.app.state.omni.statuses[503] == before + retries > before
        return retries > 3 * len(replies)  # L3: no storm

    assert not all(asked_too_often() for _ in range(2))


def test_chat_returns_a_picture(openai: OpenAI) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "a cat"}], "extra_body": {"steps": 4}}
    content = openai.chat.completions.create(**asked).choices[0].message.content
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    chunks = list(openai.chat.completions.create(stream=True, **asked))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].choices[0].delta.content[0]["type"] == "image_url"


@pytest.mark.slow
def test_edits_follow_strength_and_stream(repainter: Running, tmp_path: Path) -> None:
    client = OpenAI(base_url=repainter.url + "/v1", api_key="none", max_retries=0)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(buffer, "JPEG")
    far: list[float] = []
    for strength in (0.1, 1.0):
        made = client.images.edit(
            image=[("../../evil.svg", buffer.getvalue(), "text/plain")],
            prompt="red apple",
            extra_body={"strength": strength, "seed": 3, "steps": 10, "cache": {"enabled": False}},
        )
        far.append(float(np.abs(np.asarray(picture(made.data[0].b64_json), dtype=int) - [255, 165, 0]).mean()))
    assert far[0] < 0.8 * far[1], "little strength stays near the picture"
    assert made.usage.input_tokens_details.image_tokens > 0
    kinds = [e.type for e in client.images.edit(image=buffer.getvalue(), prompt="cat", stream=True, partial_images=1,
                                                extra_body={"steps": 6})]  # fmt: skip
    assert kinds[-1] == "image_edit.completed"
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "orange.png")
    run_example(repainter, tmp_path, "edit", "orange.png", "red apple")
    assert Image.open(tmp_path / "edited.png").size == (64, 64)


def test_edits_are_refused_by_a_text_to_image_model(openai: OpenAI, http: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    with pytest.raises(APIStatusError) as caught:
        openai.images.edit(image=buffer.getvalue(), prompt="x", extra_body={"cache": {"threshold": 0.1}})
    assert caught.value.status_code == 400 and caught.value.code == "unsupported_parameter"
    envelope(http.post("/v1/images/edits", json={}), 400, "invalid_value", "prompt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "written"), [("openai_client", 2), ("stream", 2), ("cache", 0)])
def test_examples_run(server: Running, tmp_path: Path, name: str, written: int) -> None:
    run_example(server, tmp_path, name)
    assert len(list(tmp_path.glob("*.png"))) >= written
