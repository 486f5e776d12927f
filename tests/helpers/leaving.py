"""Clients that go away at a chosen moment of their request, and what the server still does for them."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from http_server import Running, serve
from paths import PROBE
from waiting import until

from vllm_omni.entrypoints.openai import jobs, media
from vllm_omni.entrypoints.openai.protocol import streams

ENCODE_S, STEP_S, DECODE_S, FILE_S = 0.04, 0.01, 0.04, 0.04  # each part takes so much longer, and can be met
STEPS, BUSY_STEPS = 6, 1000
Event = tuple[float, str, tuple[str, ...]]  # monotonic time, what began, requests


class Trace:
    """What the engine process and the front end say that they begin."""

    def __init__(self, path: str) -> None:
        self.events: list[Event] = []
        self._news = threading.Condition()
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind(path)
        threading.Thread(target=self._read, daemon=True).start()

    def note(self, what: str, *ids: str) -> None:
        self._add((time.monotonic(), what, ids))

    def wait(self, since: int, what: str, name: str = "", nth: int = 1) -> float:
        """Until `what` has begun for the nth time after `since` events, for a request of that name; its time.

        Where it is not told for whom, it is for the one request there is.
        """
        with self._news:
            found: list[float] = []

            def came() -> bool:
                told = self.events[since:]
                found[:] = [at for at, w, ids in told if w == what and (not ids or any(name in i for i in ids))]
                return len(found) >= nth

            assert self._news.wait_for(came, 60), (what, name, self.events[since:][-20:])
            return found[nth - 1]

    def steps_after(self, since: int, name: str, left: float) -> int:
        """Steps that were begun with that request after it was left."""
        told = self.events[since:]
        return sum(what == "step" and at > left and any(name in i for i in ids) for at, what, ids in told)

    def _read(self) -> None:
        while True:
            at, what, *ids = self._end.recv(65536).decode().split()
            self._add((float(at), what, tuple(ids)))

    def _add(self, event: Event) -> None:
        with self._news:
            self.events.append(event)
            self._news.notify_all()


@dataclass
class Route:
    path: str
    body: dict[str, Any]
    form: bool = False
    stream: bool = False
    job: bool = False  # made to outlive its connection: it is left by deleting it

    @property
    def points(self) -> tuple[str, ...]:
        return ("queued", "encode", "step", "decode", "file", *(["event"] if self.stream else []))


IMAGES, EDITS, CHAT, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/videos"
SHOWN = {"stream": True, "stream_progress": True}
ASKED = {"prompt": "x", "steps": STEPS, "cache": "fast"}


def routes(kind: str, png_url: str) -> dict[str, Route]:
    """Those of a model that makes pictures ("images"), that repaints them ("edits"), that makes videos ("videos")."""
    if kind == "videos":
        return {"videos": Route(VIDEOS, {"prompt": "x", "num_inference_steps": STEPS, "cache": "fast"}, job=True)}
    text = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": png_url}}]
    message = [{"role": "user", "content": text if kind == "edits" else "x"}]
    chat = {"messages": message, "steps": STEPS, "cache": "fast"}
    own = {"strength": 1.0} if kind == "edits" else {}
    path = EDITS if kind == "edits" else IMAGES
    return {
        kind: Route(path, ASKED | own, form=kind == "edits"),
        f"{kind}-stream": Route(path, ASKED | own | SHOWN, form=kind == "edits", stream=True),
        "chat": Route(CHAT, chat | own),
        "chat-stream": Route(CHAT, chat | own | {"stream": True}, stream=True),
    }


@dataclass
class Left:
    """What came of the clients that left at one point of one route."""

    count: int = 0
    most_steps_after: int = 0
    longest_s: float = 0.0  # until the server held nothing of it any more
    missed: int = 0  # the point was over before the connection was
    wrong: list[str] = field(default_factory=list)


@dataclass
class Leaving:
    """A server whose parts are slow enough to be met, and clients that leave it."""

    server: Running
    trace: Trace
    kind: str
    png: bytes
    png_url: str
    http: httpx.Client
    counts: Path
    _ids: int = 0
    _last: Any = None  # statistics, when nothing was in flight

    @property
    def routes(self) -> dict[str, Route]:
        return routes(self.kind, self.png_url)

    @property
    def counted(self) -> list[tuple[int, int]]:
        """Bytes of the cache as the engine counted them, and of its tensors that lived, at every report so far."""
        pairs = (line.split() for line in self.counts.read_text().splitlines())
        return [(int(gauge), int(live)) for gauge, live in pairs]

    def run(self, route: Route, point: str, count: int) -> Left:
        """`count` clients leave at `point`, those of "step" at each step in turn."""
        left, before = Left(), self._last or self._stats(lambda stats: not held(stats))
        busy = self._occupy() if point == "queued" else None
        tried = 0
        while left.count < count and tried < 3 * count:
            if busy is not None and not self.server.engine._requests:
                busy = self._occupy()
            self._one(route, point, tried, left)
            tried += 1
        if busy is not None:
            busy.close()
        enough = aborts(before, point) + (0 if point == "file" else left.count)
        after = self._last = self._stats(lambda stats: aborts(stats, point) >= enough and not held(stats))
        if aborts(after, point) < enough:
            counted = aborts(after, point) - aborts(before, point)
            left.wrong.append(f"{counted} of {left.count} were counted as aborted")
        if held(after):
            left.wrong.append(f"{after.cache_bytes} bytes, {after.queued_cost_s} s of work are left")
        return left

    def _one(self, route: Route, point: str, turn: int, left: Left) -> None:
        self._ids += 1
        name, since = f"left-{self._ids:05d}", len(self.trace.events)
        with socket.create_connection(("127.0.0.1", int(self.server.url.rpartition(":")[2])), timeout=20) as gone:
            shown = {"partial_images": 3} if point == "event" and route.path != CHAT else {}
            gone.sendall(self._request(replace(route, body=route.body | shown), name))
            key = name if not route.job else ""
            if point == "queued":
                until(lambda: self._known(route, name) and len(self.server.engine._requests) > 1, pause_s=0.002)
                time.sleep(0.01)
            elif point == "event":
                gone.recv(1)
            else:
                nth = 1 + turn % STEPS if point == "step" else 1
                self.trace.wait(since, point, key, nth)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            over = [e[1] for e in self.trace.events[since:]]
        if route.job:
            key = self.http.get(VIDEOS, params={"limit": 1}).json()["data"][0]["id"]
            self.http.delete(f"{VIDEOS}/{key}")
            over = [e[1] for e in self.trace.events[since:]]
        at = time.monotonic()
        if {"encode": "step", "step": "decode", "decode": "file"}.get(point) in over:
            left.missed += 1
        else:
            left.count += 1
        until(lambda: not self._holds(route, key), pause_s=0.002)
        left.longest_s = max(left.longest_s, time.monotonic() - at)
        left.most_steps_after = max(left.most_steps_after, self.trace.steps_after(since, key, at))

    def _request(self, route: Route, name: str) -> bytes:
        made = httpx.Request(
            "POST", self.server.url + route.path, headers={"X-Request-Id": name},
            **({"data": {k: str(v) for k, v in route.body.items()}, "files": {"image": self.png}} if route.form
               else {"json": route.body}),
        )  # fmt: skip
        lines = [f"POST {route.path} HTTP/1.1".encode(), *(k + b": " + v for k, v in made.headers.raw)]
        return b"\r\n".join(lines) + b"\r\n\r\n" + made.read()

    def _known(self, route: Route, name: str) -> bool:
        state = self.server.app.state
        return bool(state.omni.videos._tasks) if route.job else name in state.omni.jobs.running

    def _holds(self, route: Route, key: str) -> bool:
        """Whether front end, its threads, or engine still have anything of a request."""
        state = self.server.app.state
        tasks = state.omni.videos._tasks if route.job else state.omni.jobs.running
        return any(key in i for i in (*tasks, *self.server.engine._requests))

    def _occupy(self) -> socket.socket:
        """The one place is taken, by a request that nobody is going to wait for."""
        since = len(self.trace.events)
        route = next(iter(self.routes.values()))
        steps = "num_inference_steps" if route.job else "steps"
        long = Route(route.path, route.body | {steps: BUSY_STEPS, "cache": "off"}, route.form)
        busy = socket.create_connection(("127.0.0.1", int(self.server.url.rpartition(":")[2])))
        busy.sendall(self._request(long, f"busy-{since}"))
        self.trace.wait(since, "step")
        return busy

    def _stats(self, settled: Callable[[Any], bool]) -> Any:
        """Once nothing is in flight and the engine has said so, and what it said is `settled`; or ten seconds later."""
        if self.kind == "videos":
            for job in self.http.get(VIDEOS, params={"limit": 100}).json()["data"]:
                self.http.delete(f"{VIDEOS}/{job['id']}")
        until(lambda: not self.server.engine._requests)
        end = time.monotonic() + 10
        while not settled(stats := self.server.idle()) and time.monotonic() < end:
            time.sleep(0.02)
        return stats


def aborts(stats: Any, point: str) -> int:
    """How many were counted, of those that waited or of all."""
    stages = stats.aborts_by_stage
    return stages.get("queued", 0) if point == "queued" else sum(stages.values())


def held(stats: Any) -> bool:
    """Whether anything of a request is left, as the engine has it."""
    return bool(stats.cache_bytes or stats.queued_cost_s)


def slowly(original: Any, seconds: float, tell: Callable[[], None]) -> Any:
    def act(*args: Any) -> Any:
        tell()
        time.sleep(seconds)
        return original(*args)

    return act


@contextmanager
def leaving(kind: str, model: str, png: bytes, png_url: str, slower: float = 1.0) -> Iterator[Leaving]:
    """A server of `model` with one place to run and some to wait; each part takes so many times longer than usual."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        trace = Trace(f"{folder}/trace")
        paths = [str(PROBE), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        slow = ",".join(str(seconds * slower) for seconds in (ENCODE_S, STEP_S, DECODE_S))
        os.environ |= {"OMNI_PROBE_TRACE": f"{folder}/trace", "OMNI_PROBE_SLOW": slow}
        os.environ["OMNI_PROBE_CACHE"] = f"{folder}/counts"
        args = {"model": model, "max_num_seqs": 1, "cache_backend": "magcache", "max_inference_steps": BUSY_STEPS}
        if kind == "videos":
            args["cache_config"] = {"mag_ratios": [1.0] * 50}
        writing = mock.patch.object(
            jobs.VideoJobs, "_write", slowly(jobs.VideoJobs._write, FILE_S * slower, lambda: trace.note("file"))
        )
        encoding = mock.patch.object(media, "encode", slowly(media.encode, FILE_S * slower, lambda: trace.note("file")))
        first = mock.patch.object(streams, "FIRST_S", 0.05)
        with (
            writing, encoding, first, serve(args, sse_keep_alive_interval_s=0.05, max_steps=BUSY_STEPS) as server,
            httpx.Client(base_url=server.url, timeout=30) as http,
        ):  # fmt: skip
            yield Leaving(server, trace, kind, png, png_url, http, Path(folder, "counts"))
