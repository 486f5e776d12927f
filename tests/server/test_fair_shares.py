"""Nobody's requests, however many, urgent or long to read, keep others from theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import httpx
import pytest
from http_replies import envelope
from http_server import CHAT, EDITS, GENERATIONS, OTHER_KEY, PROCESS_KEY, Command, Running, serve
from waiting import until
from watching import watched

from vllm_omni.entrypoints.serve_config import Limits

pytestmark = pytest.mark.alone
KEYS = ("first", "second")
MIB = 2**20
LARGE = 60 * MIB
LIVE_S = 1.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """Two keys, eight places."""
    with serve(api_key=KEYS, max_queued_requests=4) as running:
        yield running


def draw(server: Running, key: str = KEYS[0], **fields: Any) -> httpx.Response:
    body = {"prompt": "red apple", "size": "64x64", "steps": 2, "cache": "off"} | fields
    return httpx.post(server.url + GENERATIONS, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def test_priority_has_a_small_range_below_the_time_out(shared: Running) -> None:
    for priority in (-1000, -3, 3, 2**63, -(2**70)):
        envelope(draw(shared, priority=priority), 400, "invalid_value", "priority")
    assert draw(shared, priority=-2).status_code == draw(shared, priority=2).status_code == 200
    assert Limits(max_priority=1000, request_timeout_s=60).most_priority == 12
    assert Limits(max_priority=1000, request_timeout_s=4).most_priority == 0


def test_urgent_requests_do_not_starve_others(shared: Running) -> None:
    over, urgent = threading.Event(), []

    def hog() -> None:
        while not over.is_set():
            urgent.append(draw(shared, KEYS[1], steps=40, priority=-2).status_code)

    threads = [threading.Thread(target=hog) for _ in range(8)]
    for thread in threads:
        thread.start()
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda _: draw(shared, steps=4, timeout_s=30), range(3)))
    over.set()
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 3, replies[0].text
    assert 200 in urgent


def test_each_key_has_its_share_of_the_places(shared: Running) -> None:
    """Four of eight: beyond it a key is told so, and the other is still served."""
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(draw, shared, KEYS[0], steps=200, n=4)
        until(lambda: shared.app.state.omni.jobs.held.total() == 4)
        more = [pool.submit(draw, shared, KEYS[0]) for _ in range(2)]
        assert draw(shared, KEYS[1]).status_code == 200
        for reply in (one.result() for one in more):
            envelope(reply, 503, "queue_full")
            assert "share of 4" in reply.text and int(reply.headers["retry-after"]) > 0
    assert first.result().status_code == 200
    until(lambda: not shared.app.state.omni.jobs.held.total())


BODIES = {
    "lists": b'{"prompt":"x","cache":[' + b"[]," * (LARGE // 3) + b"[]]}",
    "objects": b'{"prompt":"x","cache":[' + b"{}," * (LARGE // 3) + b"{}]}",
    "a number": b'{"prompt":"x","seed":' + b"1" * LARGE + b".5}",
    "quotes": b'{"prompt":"x","cache":[' + b'"",' * (LARGE // 3) + b'""]}',
    "keys": b'{"prompt":"x","cache":{' + b",".join(b'"%d":{}' % i for i in range(LARGE // 12)) + b"}}",
    "a text": b'{"prompt":"' + b"x" * LARGE + b'"}',
    "a text that begins like a picture": b'{"prompt":"data:' + b"x" * LARGE + b'"}',
}
SMALL = {
    "lists": b'{"prompt":"x","cache":[' + b"[]," * (MIB // 3 - 20) + b"[]]}",
    "objects": b'{"prompt":"x","cache":[' + b"{}," * (MIB // 3 - 20) + b"{}]}",
    "a number": b'{"prompt":"x","seed":' + b"1" * (MIB - 30) + b".5}",
}


def undelayed(server: Command, body: bytes, count: int, expected: set[int]) -> bool:
    """Send a body so often, four at a time; whether no probe took long meanwhile."""
    headers = {"Authorization": f"Bearer {PROCESS_KEY}", "Content-Type": "application/json"}

    def ask(number: int) -> int:
        path = server.url + (GENERATIONS, CHAT)[number % 2]
        return httpx.post(path, content=body, headers=headers, timeout=60).status_code

    with watched(server, OTHER_KEY) as watch, ThreadPoolExecutor(4) as pool:
        statuses = {*pool.map(ask, range(count))}
    print(f"/health/live at most {max(watch.probes):.2f} s, usually {median(watch.probes):.3f}")
    assert statuses <= expected and watch.statuses == {200}
    return max(watch.probes) < LIVE_S


@pytest.mark.parametrize("name", BODIES)
def test_large_json_is_refused_in_a_moment(editor: Command, name: str) -> None:
    expected = {400, 413} if "picture" in name else {413}
    assert any(undelayed(editor, BODIES[name], 4, expected) for _ in range(3)), "the best of three rounds"


@pytest.mark.parametrize("name", SMALL)
def test_the_largest_json_that_is_parsed_delays_nobody(editor: Command, name: str) -> None:
    assert any(undelayed(editor, SMALL[name], 16, {400}) for _ in range(3)), "the best of three rounds"


def test_forms_have_the_same_limit(editor: Command) -> None:
    headers = {"Authorization": f"Bearer {PROCESS_KEY}"}
    forms = [{"data": {"prompt": "x", "user": "%" * (4 * MIB)}},
             {"files": {"prompt": (None, "x"), "cache": (None, "[" + "[]," * MIB + "[]]")}}]  # fmt: skip

    def undelayed_by_forms() -> bool:
        with watched(editor, OTHER_KEY) as watch:
            for form in forms:
                reply = httpx.post(editor.url + EDITS, headers=headers, timeout=60, **form)  # type: ignore[arg-type]
                envelope(reply, 413, "request_too_large")
        return max(watch.probes) < LIVE_S

    assert any(undelayed_by_forms() for _ in range(3)), "the best of three rounds"
