"""The HTTP server as clients meet it: the official client, raw requests, hostile ones. One server of the demo model."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fuzzing import MODES, Fuzz
from hostile import PRIVATE
from http_server import Running, repaint_folder, serve
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
from starlette.routing import Route

from vllm_omni.entrypoints.openai.middleware import OPEN_PATHS

KEY = "a-key"
AUTH = {"Authorization": f"Bearer {KEY}"}
URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve(api_keys=(KEY,), ui=True, max_body_mb=2, max_queued_requests=2) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=AUTH, timeout=60) as client:
        yield client


@pytest.fixture
def openai(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def picture(b64: str | None) -> Image.Image:
    assert b64
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def envelope(reply: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert not PRIVATE.search(reply.text) and len(reply.content) < 4096


def idle(server: Running) -> None:
    for _ in range(200):
        stats = server.do(server.engine.stats())
        if not stats.running and not stats.waiting and not server.app.state.omni.jobs.running:
            return
        time.sleep(0.05)
    raise AssertionError("the engine did not become idle")


def test_generate(openai: OpenAI) -> None:
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
    assert np.abs(np.asarray(images[1], dtype=int) - other).max() <= 1
    assert np.ptp(other) > 50


def test_stream_has_previews_and_one_completed_each(openai: OpenAI) -> None:
    events = list(
        openai.images.generate(
            prompt="red apple", n=2, stream=True, partial_images=2, extra_body={"seed": 1, "steps": 9, "cache": "off"}
        )
    )
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds.count("completed") == 2 and kinds.count("partial_image") == 4
    assert all(picture(event.b64_json).size for event in events)
    assert events[-1].usage.output_tokens > 0


async def test_async_client_and_raw_reply(server: Running) -> None:
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


async def test_c1_replies_are_the_official_types(server: Running, repainter: Running) -> None:
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


STREAMED = {"generate": [ImageGenPartialImageEvent, ImageGenCompletedEvent],
            "edit": [ImageEditPartialImageEvent, ImageEditCompletedEvent]}  # fmt: skip
SLOW = {"steps": 200, "cache": "off"}
WRONG: list[tuple[dict[str, Any], type, int, str | None]] = [
    ({"prompt": ""}, BadRequestError, 400, "invalid_value"),
    ({"extra_body": {"sede": 1}}, BadRequestError, 400, "unknown_parameter"),
    ({"api_key": "wrong"}, AuthenticationError, 401, "invalid_api_key"),
    ({"model": "dall-e-9"}, NotFoundError, 404, "model_not_found"),
    ({"prompt": "x" * (3 << 20)}, APIStatusError, 413, "request_too_large"),
    ({"n": 10, "extra_body": SLOW}, InternalServerError, 503, "queue_full"),
    ({"extra_body": SLOW | {"timeout_s": 0.2}, "max_retries": 5}, InternalServerError, 504, "deadline_exceeded"),
    ({"extra_body": SLOW, "timeout": 0.2}, APITimeoutError, 0, None),
    ({"base_url": "http://127.0.0.1:9/v1"}, APIConnectionError, 0, None),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[2]}-{case[3]}")
async def test_c1_every_error_has_its_class(server: Running, case: tuple[dict[str, Any], type, int, str]) -> None:
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
            for _ in range(300):  # a reply to a body that was refused is counted when the body has been read
                if server.app.state.omni.statuses[status] > before:
                    break
                time.sleep(0.01)
            assert server.app.state.omni.statuses[status] == before + 1
        idle(server)


def test_chat_gives_a_picture(openai: OpenAI) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "a cat"}], "extra_body": {"steps": 4}}
    content = openai.chat.completions.create(**asked).choices[0].message.content
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    chunks = list(openai.chat.completions.create(stream=True, **asked))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].choices[0].delta.content[0]["type"] == "image_url"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "\0"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 32001}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": "1"}, "n", "invalid_value"),
        ({"n": 2**63}, "n", "invalid_value"),
        ({"size": "63x64"}, "size", "invalid_value"),
        ({"size": "99999x99999"}, "size", "invalid_value"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"steps": 201}, "num_inference_steps", "invalid_value"),
        ({"guidance_scale": -1}, "guidance_scale", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"svg": True}, "svg", "unsupported_parameter"),
        ({"sede": 1}, "sede", "unknown_parameter"),
        ({"cache": {"treshold": 1}}, "treshold", "unknown_parameter"),
        ({"cache": "fastest"}, "cache", "invalid_value"),
        ({"cache": {"profile": "/etc/passwd"}}, "cache.profile", "invalid_value"),
        ({"cache": {"profile": "../x"}}, "cache.profile", "invalid_value"),
        ({"lora": "../../x"}, "lora_request", "invalid_value"),
        ({"timeout_s": 1e9}, "timeout_s", "invalid_value"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, change: dict, param: str, code: str) -> None:
    envelope(http.post(URL, json={"prompt": "x", "steps": 2} | change), 400, code, param)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"prompt": NaN}', b'{"prompt": "a", "prompt": "b"}', b"[" * 100_000, b"\xff\xfe",
     b'{"prompt": "\\ud800"}', b'{"prompt": "x", "guidance_scale": 1e400}', b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_none(http: httpx.Client, body: bytes) -> None:
    reply = http.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"] and not PRIVATE.search(reply.text)


def test_one_envelope_for_every_status(http: httpx.Client, server: Running) -> None:
    envelope(http.get("/nope"), 404, "not_found")
    envelope(http.get(URL), 405, "method_not_allowed")
    envelope(http.post("/v1/images/variations"), 410, "gone")
    envelope(http.get("/v1/models/other"), 404, "model_not_found", "model")
    envelope(http.delete("/v1/images/jobs/other"), 404, "not_found", "job_id")
    envelope(http.post(URL, content=b"x" * (3 << 20)), 413, "request_too_large")
    chunks = (b"x" * 65536 for _ in range(64))
    envelope(http.post(URL, content=chunks), 413, "request_too_large")
    envelope(httpx.post(server.url + URL, json={}), 401, "invalid_api_key")


def test_edits_of_a_model_without_pictures(openai: OpenAI, http: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    with pytest.raises(APIStatusError) as caught:
        openai.images.edit(image=buffer.getvalue(), prompt="x", extra_body={"cache": {"threshold": 0.1}})
    assert caught.value.status_code == 400 and caught.value.code == "unsupported_parameter"
    envelope(http.post("/v1/images/edits", json={}), 400, "invalid_request")


def test_no_route_answers_without_the_key(server: Running) -> None:
    routes = [route for route in server.app.routes if isinstance(route, Route)]
    assert len(routes) > 12
    with httpx.Client(base_url=server.url) as client:
        for route in routes:
            path = route.path.replace("{job_id}", "x").replace("{model_id:path}", "x")
            for method in sorted(route.methods or ()):
                for headers in ({}, {"Authorization": "Bearer a-ke"}, {"Authorization": f"Basic {KEY}"},
                                {"Host": "x/health?"}, {"Authorization": f"Bearer {KEY.upper()}"}):  # fmt: skip
                    status = client.request(method, path, headers=headers).status_code
                    opened = route.path in OPEN_PATHS | {"/ui"}
                    assert (status == 401) != opened, (method, path, headers, status)
        for path in ("//v1/models", "/%2fv1/models", "/health/../v1/models", "/health%2f..%2fmetrics", "/x"):
            assert client.get(path).status_code == 401, path


def test_leaving_ends_the_work(server: Running, http: httpx.Client) -> None:
    before = server.do(server.engine.stats()).requests.get("aborted", 0)
    with pytest.raises(httpx.ReadTimeout):
        http.post(URL, json={"prompt": "x", "steps": 200, "cache": "off"}, timeout=0.4)
    with http.stream("POST", URL, json={"prompt": "x", "steps": 200, "cache": "off", "stream": True,
                                        "stream_progress": True}) as reply:  # fmt: skip
        next(reply.iter_lines())
    idle(server)
    assert server.do(server.engine.stats()).requests["aborted"] == before + 2


def test_delete_and_deadline(server: Running, http: httpx.Client) -> None:
    body = {"prompt": "x", "steps": 200, "cache": "off"}
    with http.stream("POST", URL, json=body | {"stream": True, "stream_progress": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert http.delete(f"/v1/images/jobs/{reply.headers['x-request-id']}").json()["deleted"]
        last = [line for line in lines if line.startswith("data:")][-1]
    assert json.loads(last[5:])["error"]["code"] == "request_cancelled"
    late = http.post(URL, json=body | {"timeout_s": 0.3})
    envelope(late, 504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false"
    idle(server)


def test_full_queue(server: Running, http: httpx.Client) -> None:
    full = http.post(URL, json={"prompt": "x", "n": 10, "steps": 50, "cache": "off"})
    envelope(full, 503, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    idle(server)
    assert http.post(URL, json={"prompt": "x", "steps": 2}).status_code == 200


def test_health_models_cache_metrics(http: httpx.Client) -> None:
    assert [http.get(path).status_code for path in sorted(OPEN_PATHS)] == [200] * 4
    assert http.get("/version").json()["version"]
    (model,) = http.get("/v1/models").json()["data"]
    assert model == http.get("/v1/models/demo").json() and model["omni"]["limits"]["n"] == 10
    cache = http.get("/v1/omni/cache").json()
    assert cache["backend"] == "magcache" and cache["recent"] and "prompt" not in cache["recent"][0]
    text = http.get("/metrics").text
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm_omni:denoise_steps_total",
                 "vllm_omni:denoise_batch_size_bucket", "vllm:e2e_request_latency_seconds_bucket",
                 'vllm_omni:http_replies_total{model_name="demo",status="200"}'):  # fmt: skip
        assert name in text, name


def test_page_is_one_file(server: Running) -> None:
    reply = httpx.get(server.url + "/ui")
    assert reply.status_code == 200 and "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", reply.text)


def test_fuzz(server: Running) -> None:
    """Schemathesis, valid and invalid requests of every operation; `stress/http_fuzz.py` asks more."""
    fuzz = Fuzz(server.url, AUTH)
    for mode in MODES:
        fuzz.operations(mode, 8)
    fuzz.sequences(5)
    assert not fuzz.failures, fuzz.failures
    seen = sum(fuzz.statuses.values(), Counter[int]())
    assert seen.total() > 200 and seen[200] > 40 and seen[400] > 40, seen


@pytest.mark.parametrize(("name", "written"), [("openai_client", 2), ("stream", 2), ("cache", 0)])
def test_examples(server: Running, tmp_path: Path, name: str, written: int) -> None:
    _example(server, tmp_path, name)
    assert len(list(tmp_path.glob("*.png"))) >= written


def _example(server: Running, folder: Path, name: str, *arguments: str) -> None:
    file = Path(__file__).parent.parent / "examples" / "serving" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    env = os.environ | {"OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, str(file), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def repainter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo's weights as an image-to-image pipeline: the folder differs in one line."""
    folder = repaint_folder(tmp_path_factory.mktemp("models"))
    with serve({"model": str(folder), "max_num_seqs": 4}) as running:
        yield running


def test_edits(repainter: Running, tmp_path: Path) -> None:
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
    _example(repainter, tmp_path, "edit", "orange.png", "red apple")
    assert Image.open(tmp_path / "edited.png").size == (64, 64)


def test_no_address_is_opened(repainter: Running) -> None:
    fetched = httpx.post(repainter.url + "/v1/images/edits",
                         files={"prompt": (None, "x"), "url": (None, "http://127.0.0.1:1/x.png")})  # fmt: skip
    envelope(fetched, 400, "invalid_image", "url")
