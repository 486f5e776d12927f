"""Clients that leave, cancel or time out at any stage: their work ends, nothing stays held, others are unchanged.

The long run, of all routes, is `stress/http_leave.py`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
from closeness import levels_apart
from http_replies import envelope, pixels
from http_server import CHAT, GENERATIONS, KEY, LONG, Running, repaint_folder
from leaving import STEP_S, Leaving, Route, leaving
from PIL import Image
from waiting import until

from vllm_omni.entrypoints.openai.generation import plan_images
from vllm_omni.entrypoints.openai.protocol.requests import ImageRequest
from vllm_omni.entrypoints.openai.protocol.streams import Event, EventStream

pytestmark = pytest.mark.alone
SLOWER = 5  # a step longer than a machine may stand still
BUSY = {"steps": 200, "cache": "off"}  # longer than what is done meanwhile
ROUTES = {
    "generations": (GENERATIONS, {"prompt": "x"}),
    "stream": (GENERATIONS, {"prompt": "x", "stream": True, "stream_progress": True, "partial_images": 3}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    "chat-stream": (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True}),
}


def leave(server: Running, route: str, stay: Callable[[], Any], **more: Any) -> None:
    """Send a request, `stay`, and close the connection by a reset."""
    path, body = ROUTES[route]
    data = json.dumps(body | more).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as gone:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        gone.sendall(head.encode() + data)
        stay()
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_leaving_at_any_moment_ends_the_request(server: Running, http: httpx.Client, route: str) -> None:
    """Before it is read, while encoding, at every step, at decoding and after: all is given back at once."""
    began = time.perf_counter()
    assert http.post(ROUTES[route][0], json=ROUTES[route][1] | {"steps": 12, "cache": "off"}).status_code == 200
    whole = time.perf_counter() - began
    for part in range(14):
        leave(server, route, partial(time.sleep, whole * part / 12), steps=12, cache="off")
    stats = server.idle()
    assert sum(stats.aborts_by_stage.values()) >= 4 and stats.cache_bytes == 0
    before = server.idle().steps_computed
    leave(server, route, lambda: until(lambda: server.do(server.engine.stats()).running), **LONG)
    assert server.idle().steps_computed - before < 100, "it went on to its 200 steps"


def test_leaving_while_queued_is_counted_as_such(server: Running, http: httpx.Client) -> None:
    before = server.do(server.engine.stats()).aborts_by_stage.get("queued", 0)
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(http.post, GENERATIONS, json={"prompt": "x"} | BUSY) for _ in range(4)]
        until(lambda: server.do(server.engine.stats()).running == 4)
        for route in ROUTES:
            leave(server, route, lambda: until(lambda: len(server.engine._requests) == 5, pause_s=0.002), steps=5)
            until(lambda: len(server.engine._requests) == 4, pause_s=0.002)
        assert all(future.result().status_code == 200 for future in busy)
    assert server.idle().aborts_by_stage.get("queued", 0) - before == 4


def test_leaving_while_the_job_ends_leaves_no_job(server: Running) -> None:
    """The last picture has come and the job is being put away: a client that leaves then leaves no job behind."""
    state = server.app.state.omni
    generation = plan_images(ImageRequest(prompt="x", num_inference_steps=1), state.info, state.config.limits)

    async def leave_after(turns: int) -> None:
        came = asyncio.Event()

        async def listen() -> None:
            async for _, output in state.jobs.run(generation, f"end-{turns}"):
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
        assert not state.jobs.running, turns
    server.idle()


def test_leaving_does_not_change_the_rest_of_the_batch(server: Running, http: httpx.Client) -> None:
    bodies = [{"prompt": "cat", "seed": seed, "steps": 20, "cache": "off"} for seed in range(3)]
    alone = [pixels(http.post(GENERATIONS, json=body)) for body in bodies]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(http.post, GENERATIONS, json=body) for body in bodies]
        leave(server, "generations", partial(time.sleep, 0.2), steps=20, cache="off")
        together = [pixels(future.result()) for future in futures]
    assert all(levels_apart(a, b) <= 1 for a, b in zip(alone, together, strict=True))


def test_a_read_timeout_and_a_closed_stream_abort_the_request(server: Running, http: httpx.Client) -> None:
    before = server.do(server.engine.stats()).requests.get("aborted", 0)
    with pytest.raises(httpx.ReadTimeout):
        http.post(GENERATIONS, json={"prompt": "x"} | LONG, timeout=0.4)
    shown = {"stream": True, "stream_progress": True}
    with http.stream("POST", GENERATIONS, json={"prompt": "x"} | LONG | shown) as reply:
        next(reply.iter_lines())
    server.idle()
    assert server.do(server.engine.stats()).requests["aborted"] == before + 2


def deleted(http: httpx.Client, name: str) -> bool:
    return http.delete(f"/v1/images/jobs/{name}").status_code == 200


def test_delete_ends_a_job_on_every_route(server: Running, http: httpx.Client) -> None:
    before = server.idle().steps_computed
    for route, (path, body) in ROUTES.items():
        name = f"job-{route}"
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(http.post, path, json=body | LONG, headers={"X-Request-Id": name})
            until(partial(deleted, http, name))
            told = future.result()
        assert "request_cancelled" in told.text and told.status_code in (499, 200), told.text
        steps, before = server.idle().steps_computed - before, server.idle().steps_computed
        assert steps < 100, "it went on to its 200 steps"


def test_delete_ends_a_stream_and_a_deadline_is_504(server: Running, http: httpx.Client) -> None:
    body = {"prompt": "x"} | LONG
    with http.stream("POST", GENERATIONS, json=body | {"stream": True, "stream_progress": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert http.delete(f"/v1/images/jobs/{reply.headers['x-request-id']}").json()["deleted"]
        last = [line for line in lines if line.startswith("data:")][-1]
    assert json.loads(last[5:])["error"]["code"] == "request_cancelled"
    late = http.post(GENERATIONS, json=body | {"timeout_s": 0.3})
    envelope(late, 504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false"
    server.idle()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_deadline_is_kept(server: Running, http: httpx.Client, share: float) -> None:
    """Neither early nor late: after that share of a whole run, and before half of the rest; the best of three."""
    body = {"prompt": "x", "steps": 200, "cache": "off"}

    def kept() -> bool:
        began = time.perf_counter()
        assert http.post(GENERATIONS, json=body).status_code == 200
        whole = time.perf_counter() - began
        before, began = server.idle().steps_computed, time.perf_counter()
        late = http.post(GENERATIONS, json=body | {"timeout_s": share * whole})
        took, steps = time.perf_counter() - began, server.idle().steps_computed - before
        print(f"{whole:.2f} s in all, {late.status_code} after {took:.2f} s and {steps} steps")
        return late.status_code == 504 and share * whole < took < (share + 1) / 2 * whole and steps < 200

    assert any(kept() for _ in range(3))


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaving]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(buffer, "PNG")
    model = str(repaint_folder(tmp_path_factory.mktemp("models")))
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with leaving("edits", model, buffer.getvalue(), url, SLOWER) as made:
        yield made


def dropped(clients: Leaving, route: Route, point: str) -> bool:
    """Whether two that left at this point were at once; what is left of them is wrong in any case."""
    left = clients.run(route, point, 2)
    print(point, left)
    assert left.count == 2 and not left.wrong, (point, left)
    return left.most_steps_after <= 1 and left.longest_s < 50 * STEP_S * SLOWER


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edits", "edits-stream", "chat", "chat-stream"])
def test_leaving_at_every_stage_ends_within_one_step(clients: Leaving, name: str) -> None:
    """Dropped within one step, and nothing of it is left: no job, no request, no byte of its cache."""
    for point in (route := clients.routes[name]).points:
        assert any(dropped(clients, route, point) for _ in range(2)), point


@pytest.mark.slow
def test_the_cache_gauge_equals_the_bytes_of_the_tensors(clients: Leaving) -> None:
    body = {"prompt": "x", "steps": "60", "strength": "1.0", "cache": "fast"}
    reply = clients.http.post("/v1/images/edits", data=body, files={"image": clients.png})
    assert reply.status_code == 200, reply.text
    counted = clients.counted
    assert all(gauge == live for gauge, live in counted) and max(counted)[0] > 0


@pytest.mark.parametrize("turns", range(8))
async def test_an_event_stream_ends_when_its_client_leaves_during_an_event(turns: int) -> None:
    """The disconnect is told `turns` turns of the loop after the event was made, so that in one of them both meet."""
    go, left = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncIterator[Event]:
        yield "first", {}
        await go.wait()
        yield "second", {}
        await asyncio.Event().wait()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    serving = asyncio.create_task(EventStream(events(), keep_alive_s=0.05)({"type": "http"}, receive, send))
    await asyncio.sleep(0.02)
    go.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    left.set()
    done, _ = await asyncio.wait({serving}, timeout=30)
    if not done:
        serving.cancel()
    assert done, "it goes on for ever"
