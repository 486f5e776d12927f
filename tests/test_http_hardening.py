"""The server's promises, one by one: retries, metrics, reproducibility, leaving at every stage, limits, isolation."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hostile import MEMBERS, NUMBERS, PATHS, quickest, says_too_much, wrong_numbers
from http_server import Running, serve
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vllm_omni.entrypoints.openai.generation import plan_images
from vllm_omni.entrypoints.openai.protocol.requests import ImageRequest

URL = "/v1/images/generations"
CHAT = "/v1/chat/completions"
ERRORS: list[str] = []  # the body of every error that a test here was told


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve(max_body_mb=1, max_queued_requests=4, ui=True) as running:
        yield running


@pytest.fixture(scope="module")
def other() -> Iterator[Running]:
    """A second process of the same model, behind a proxy's path and a key."""
    with serve(api_keys=("k",), root_path="/api", warmup=False) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    def keep(reply: httpx.Response) -> None:
        if reply.status_code >= 400:
            reply.read()
            ERRORS.append(reply.text)

    limits = httpx.Limits(max_connections=64)
    with httpx.Client(base_url=server.url, timeout=60, limits=limits, event_hooks={"response": [keep]}) as client:
        yield client


def pixels(reply: httpx.Response, index: int = 0) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][index]["b64_json"]))), dtype=int)


def digest(reply: httpx.Response, index: int = 0) -> str:
    return hashlib.sha256(pixels(reply, index).astype(np.uint8).tobytes()).hexdigest()


def idle(server: Running) -> Any:
    """The statistics once nothing runs."""
    jobs = server.app.state.omni.jobs.running
    for _ in range(400):
        stats = server.do(server.engine.stats())
        if not stats.running and not stats.waiting and not jobs:
            return stats
        time.sleep(0.02)
    raise AssertionError(f"not idle: {stats.running} run, {stats.waiting} wait, jobs: {list(jobs)}")


# --------------------------------------------------------------------------------------------------- contract (C1 - C4)


def test_c1_client_retries_a_full_queue_until_it_is_served(server: Running) -> None:
    """More clients than places: each is told when to come back, does so, and none is lost or asks too often."""
    before = server.app.state.omni.statuses.copy()
    client = OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=20)

    def one(seed: int) -> Any:
        return client.images.with_raw_response.generate(
            prompt="cat", extra_body={"seed": seed, "steps": 30, "cache": "off"}
        )

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(one, range(16)))
    assert all(reply.parse().data[0].b64_json for reply in replies)
    sent_away = server.app.state.omni.statuses[503] - before[503]
    assert sent_away == sum(reply.retries_taken for reply in replies) > 0
    assert sent_away <= 3 * len(replies)  # L3: no storm


def families(http: httpx.Client) -> dict[tuple[str, str], float]:
    text = http.get("/metrics").text
    return {(s.name, json.dumps(s.labels)): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def test_c2_metrics_add_up(server: Running, http: httpx.Client) -> None:
    idle(server)
    before = families(http)
    for body in ({"steps": 3}, {"steps": 3, "n": 2}, {"steps": 200, "cache": "off", "timeout_s": 0.2}, {"steps": 0}):
        http.post(URL, json={"prompt": "x"} | body)
    with pytest.raises(httpx.ReadTimeout):
        http.post(URL, json={"prompt": "x", "steps": 200, "cache": "off"}, timeout=0.3)
    idle(server)
    time.sleep(0.6)
    after = families(http)
    counters = [key for key in before if key[0].endswith(("_total", "_bucket", "_count", "_sum"))]
    assert len(counters) > 30 and all(after[key] >= before[key] for key in counters)
    outcomes = {json.loads(label)["finished_reason"]: value - before.get((name, label), 0)
                for (name, label), value in after.items() if name == "vllm:request_success_total"}  # fmt: skip
    assert outcomes == {"finished": 3, "expired": 1, "aborted": 1} | {
        k: 0 for k in outcomes.keys() - {"finished", "expired", "aborted"}
    }
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm_omni:cache_state_bytes",
        "vllm_omni:queued_cost_seconds",
    ):
        assert [value for (key, _), value in after.items() if key == name] == [0], name
    assert len(after) < 200


def test_c3_a_seed_is_a_picture(server: Running, other: Running, http: httpx.Client) -> None:
    """Alone, among others, in another order: the same bytes; and after a restart."""
    bodies = [{"prompt": p, "seed": s, "steps": 9, "cache": c} for p, s, c in
              (("cat", 1, "fast"), ("rocket", 2, "off"), ("cat", 3, "balanced"))]  # fmt: skip
    alone = [digest(http.post(URL, json=body)) for body in bodies]
    assert len(set(alone)) == 3
    again = [digest(http.post(URL, json=body)) for body in reversed(bodies)]
    assert again == alone[::-1]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda body: pixels(http.post(URL, json=body)), bodies))
    for body, picture in zip(bodies, together, strict=True):
        assert np.abs(picture - pixels(http.post(URL, json=body))).max() <= 1
    twin = http.post(URL, json={"prompt": "cat", "seed": 0, "n": 2, "steps": 9, "cache": "fast"})
    assert np.abs(pixels(twin, 1) - pixels(http.post(URL, json=bodies[0]))).max() <= 1
    headers = {"Authorization": "Bearer k"}
    restarted = [digest(httpx.post(other.url + URL, json=body, timeout=60, headers=headers)) for body in bodies]
    assert restarted == alone


def test_c4_a_file_makes_its_picture_again(http: httpx.Client) -> None:
    first = http.post(
        URL, json={"prompt": "penguin ☃", "steps": 11, "cache": {"threshold": 0.2}, "guidance_scale": 2.5}
    )
    file = Image.open(io.BytesIO(base64.b64decode(first.json()["data"][0]["b64_json"])))
    assert digest(http.post(URL, json=json.loads(file.info["vllm_omni"]))) == digest(first)


def test_usage_counts_what_the_text_encoder_reads(http: httpx.Client) -> None:
    def tokens(prompt: str) -> int:
        return http.post(URL, json={"prompt": prompt, "steps": 1}).json()["usage"]["input_tokens_details"][
            "text_tokens"
        ]

    assert tokens("cat") < tokens("cat cat cat") < tokens("cat " * 200) == tokens("cat " * 400)  # it reads no further


# --------------------------------------------------------------------------------------------------- leaving (A1 - A4)

ROUTES = {
    "generations": (URL, {"prompt": "x"}),
    "stream": (URL, {"prompt": "x", "stream": True, "stream_progress": True, "partial_images": 3}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    "chat-stream": (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True}),
}


def leave(server: Running, route: str, seconds: float, **more: Any) -> None:
    """Send a request and close the connection after a while, by a reset."""
    path, body = ROUTES[route]
    data = json.dumps(body | more).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as gone:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        gone.sendall(head.encode() + data)
        time.sleep(seconds)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("route", ROUTES)
def test_a1_leaving_at_any_moment(server: Running, http: httpx.Client, route: str) -> None:
    """Before it is read, while encoding, at every step, at decoding and after: all is given back at once."""
    began = time.perf_counter()
    assert http.post(ROUTES[route][0], json=ROUTES[route][1] | {"steps": 12, "cache": "off"}).status_code == 200
    whole = time.perf_counter() - began
    for part in range(14):
        leave(server, route, whole * part / 12, steps=12, cache="off")
    stats = idle(server)
    assert sum(stats.aborts_by_stage.values()) >= 4 and stats.cache_bytes == 0
    leave(server, route, 0.15, steps=200, cache="off")
    began = time.perf_counter()
    idle(server)
    assert time.perf_counter() - began < 1.5, "200 steps would take longer than this"


def test_a1_leaving_while_queued(server: Running, http: httpx.Client) -> None:
    before = server.do(server.engine.stats()).aborts_by_stage.get("queued", 0)
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(http.post, URL, json={"prompt": "x", "steps": 60, "cache": "off"}) for _ in range(4)]
        time.sleep(0.3)
        for route in ROUTES:
            leave(server, route, 0.05, steps=5)
        assert all(future.result().status_code == 200 for future in busy)
    assert idle(server).aborts_by_stage.get("queued", 0) - before == 4


def test_a3_the_others_of_a_batch_do_not_notice(server: Running, http: httpx.Client) -> None:
    bodies = [{"prompt": "cat", "seed": seed, "steps": 20, "cache": "off"} for seed in range(3)]
    alone = [pixels(http.post(URL, json=body)) for body in bodies]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(http.post, URL, json=body) for body in bodies]
        leave(server, "generations", 0.2, steps=20, cache="off")
        together = [pixels(future.result()) for future in futures]
    assert max(int(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True)) <= 1


def test_a4_delete_ends_a_job_on_every_route(server: Running, http: httpx.Client) -> None:
    for route, (path, body) in ROUTES.items():
        name = f"job-{route}"
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(
                http.post, path, json=body | {"steps": 200, "cache": "off"}, headers={"X-Request-Id": name}
            )
            for _ in range(200):
                if http.delete(f"/v1/images/jobs/{name}").status_code == 200:
                    break
                time.sleep(0.01)
            began = time.perf_counter()
            told = future.result()
        assert "request_cancelled" in told.text and told.status_code in (499, 200), told.text
        assert time.perf_counter() - began < 1.0
    idle(server)


def test_a1_leaving_in_any_turn_of_the_end(server: Running) -> None:
    """The last picture has come and the job is being put away: a client that leaves then leaves no job behind."""
    here = server.app.state.omni
    generation = plan_images(ImageRequest(prompt="x", num_inference_steps=1), here.info, here.config)

    async def leave_after(turns: int) -> None:
        came = asyncio.Event()

        async def listen() -> None:
            async for _, output in here.jobs.run(generation, f"end-{turns}"):
                if output.finished:
                    came.set()

        listener = asyncio.create_task(listen())
        await came.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)

    for turns in range(8):
        server.do(leave_after(turns))
        assert not here.jobs.running, turns
    idle(server)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.7])
def test_a4_a_deadline_is_kept(http: httpx.Client, seconds: float) -> None:
    began = time.perf_counter()
    late = http.post(URL, json={"prompt": "x", "steps": 200, "cache": "off", "timeout_s": seconds})
    assert late.status_code == 504 and time.perf_counter() - began < seconds + 0.5


# ------------------------------------------------------------------------------------------------ safety (S2 - S9, S15)


@pytest.mark.parametrize("name", NUMBERS)
def test_s2_numbers(server: Running, http: httpx.Client, name: str) -> None:
    """What is no value of the field is refused at once and named, in JSON and in chat; its limits are not."""
    low, high, _ = NUMBERS[name]
    json_type = {"Content-Type": "application/json"}
    bodies = {URL: '{"prompt": "x", "%s": %s}', CHAT: '{"messages": [{"role": "user", "content": "x"}], "%s": %s}'}
    for path, body in bodies.items():
        for value in wrong_numbers(name):

            def ask(text: str = body % (name, value), path: str = path) -> httpx.Response:
                return http.post(path, content=text, headers=json_type)

            reply = ask()
            assert reply.status_code == 400 and len(reply.content) < 4096, (value, reply.text)
            wanted = (name, {"steps": "num_inference_steps"}.get(name, name))  # NaN is refused where it is read
            assert reply.json()["error"]["param"] in wanted, (value, reply.text)
        assert quickest(ask, 0.005) < 0.005
    if name == "strength":
        return  # not of this model
    few = {"prompt": "x", "output_format": "jpeg", "width": 16, "height": 16, "steps": 1}
    if name == "num_inference_steps":
        del few["steps"]
    ends = {("n", 10): 503, ("timeout_s", low): 504}  # more than there are places for; a moment
    for value in (low, high, None):
        reply = http.post(URL, json=few | {name: 16 if value is None and name in few else value})
        assert reply.status_code == ends.get((name, value), 200), (value, reply.text)
        idle(server)


@pytest.mark.parametrize("text", MEMBERS, ids=range(len(MEMBERS)))
def test_s3_members_that_are_none(http: httpx.Client, text: str) -> None:
    """Deep, doubled, endless, not finite, not Unicode: 400 from both routes."""
    for path, start in ((URL, '"prompt": "x", '), (CHAT, '"messages": [{"role": "user", "content": "x"}], ')):
        start = "" if path == URL and '"prompt"' in text else start
        body = f'{{{start}{text}, "steps": 1}}'.encode()
        reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and len(reply.content) < 4096, reply.text


PROMPTS = [
    "",
    " ",
    "x" * 32_000,
    "x" * 32_001,
    "a\0b",
    "\u202eabc",
    "مرحبا",
    "👩‍👩‍👧",
    "\uffff",
    "{{7*7}}",
    "<|endoftext|>",
    "\r\n" * 50,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_s3_prompts(http: httpx.Client, prompt: str) -> None:
    reply = http.post(URL, json={"prompt": prompt, "steps": 1})
    assert reply.status_code == (200 if prompt.strip() and "\0" not in prompt and len(prompt) <= 32_000 else 400), (
        reply.text
    )


POST = b"POST %b HTTP/1.1\r\nHost: x\r\n" % URL.encode()
RAW = [
    b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"POST " + URL.encode() + b" HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"b" * 1_000_000 + b"\r\n\r\n",
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    POST + b"Content-Length: -1\r\n\r\n",
    POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 65_000 + b"0\r\n\r\n",
    b"G\0T / HTTP/1.1\r\n\r\n", b"\r\n\r\n\r\n", b"POST http://x/../../etc HTTP/1.1\r\nHost: x\r\n\r\n",
    POST + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n" + b"\x1f\x8b" * 10,
]  # fmt: skip


def test_s4_raw_bytes(server: Running, http: httpx.Client) -> None:
    fds = Path("/proc/self/fd")
    http.get("/health")
    before = len(list(fds.iterdir()))
    for data in RAW * 3:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as raw:
            try:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(65536)
            except OSError:
                answer = b""
            assert not answer or int(answer.split()[1]) in range(400, 500), (data[:60], answer[:100])
            if answer:
                ERRORS.append(answer.decode("latin-1"))
    assert http.get("/health").status_code == 200
    time.sleep(0.3)
    assert len(list(fds.iterdir())) <= before + 4


def test_s4_every_route_and_method(server: Running, http: httpx.Client) -> None:
    known = sorted({route.path for route in server.app.routes if "{" not in route.path})
    paths = [*known, "/", "/%00", "/..%2f..%2fetc/passwd"]
    for path, method in itertools.product(
        paths, ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X" * 20)
    ):
        reply = http.request(method, path, content=b"\xff{" if method in ("POST", "PUT") else None)
        assert reply.status_code < 500, (method, path, reply.text)


def test_s5_bodies_over_the_limit(http: httpx.Client, server: Running) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 65536
            yield b"x" * 65536

    assert http.post(URL, content=b"x" * (1 << 21)).status_code == 413
    assert http.post(URL, content=chunks()).status_code == 413
    bomb = zlib.compress(b"x" * 10_000_000)
    assert http.post(URL, content=bomb, headers={"Content-Encoding": "deflate"}).status_code == 400
    edges = [("image", b"x")] * 10_000
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in edges
    )
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (
        parts[:900_000] + b"--b--\r\n",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b",
        b"",
    ):
        reply = http.post("/v1/images/edits", content=body, headers=form)
        assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("bad", [name for name in PATHS if name.strip(".")])  # a client takes those out of a path
def test_s8_names_are_no_paths(http: httpx.Client, bad: str) -> None:
    for body in ({"lora": bad}, {"lora": {"name": bad}}, {"model": bad}, {"cache": {"profile": bad}}, {"cache": bad}):
        reply = http.post(URL, json={"prompt": "x", "steps": 1} | body)
        assert reply.status_code in (400, 404), (body, reply.text)
    for path in (f"/v1/models/{bad}", f"/v1/images/jobs/{bad}"):
        assert http.request("GET" if "models" in path else "DELETE", path).status_code in (400, 404, 405)


def test_s9_no_websocket_and_a_root_path_keep_the_gate_closed(other: Running) -> None:
    with httpx.Client(base_url=other.url) as client:
        for path in ("/api/v1/models", "/v1/models", "/api/metrics", "/api/api/v1/models", "//api/v1/models"):
            assert client.get(path).status_code == 401, path
            assert (
                client.options(path, headers={"Origin": "http://x", "Access-Control-Request-Method": "GET"}).status_code
                == 401
            )
        assert client.get("/api/health").status_code == 200
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "eA==",
        }
        assert client.get("/v1/models", headers=upgrade).status_code in (400, 401, 403)
        assert client.get("/api/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_s15_requests_do_not_meet(server: Running, http: httpx.Client) -> None:
    """Pairs with marked prompts and seeds, at once: each gets its own prompt, seed, id and picture."""
    words = ("cat", "rocket", "guitar", "penguin")

    def one(index: int) -> tuple[int, httpx.Response]:
        body = {
            "prompt": f"{words[index % 4]} marker{index}",
            "seed": index,
            "steps": 4,
            "cache": ("off", "fast")[index % 2],
        }
        for _ in range(500):
            reply = http.post(URL, json=body, headers={"X-Request-Id": f"marked-{index}"})
            if reply.status_code != 503:
                return index, reply
            time.sleep(0.02)
        raise AssertionError("never served")

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(one, range(80)))
    for index, reply in replies:
        told = reply.json()
        file = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
        own = json.loads(file.info["vllm_omni"])
        assert own["prompt"].endswith(f" marker{index}") and own["seed"] == told["data"][0]["seed"] == index
        assert told["omni"]["request_id"] == reply.headers["x-request-id"] == f"marked-{index}"
        assert (told["omni"]["images"][0]["cache"] == "off") == (index % 2 == 0)
        assert set(re.findall(r"marker(\d+)", file.info["parameters"] + file.info["vllm_omni"])) == {str(index)}
    for index, reply in replies[:6]:
        assert np.abs(pixels(reply) - pixels(one(index)[1])).max() <= 1


def test_s14_no_error_says_too_much(http: httpx.Client) -> None:
    """All the error bodies that the tests above were told, and one more."""
    http.post(URL, json={"prompt": "x", "cache": {"profile": "/etc/passwd"}})
    assert ERRORS and not list(filter(says_too_much, ERRORS))
