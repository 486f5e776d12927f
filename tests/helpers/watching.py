"""A neighbour and the probes, while somebody attacks: how long an ordinary edit and `/health/live` take.

They ask in a process of their own, so that what the attackers' threads do in the test's is no delay of the server's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx
from hostile import saved, scene
from waiting import until

if TYPE_CHECKING:  # the other process shall begin in a moment
    from http_server import Command

NEIGHBOUR = {"prompt": "x", "size": "64x64", "steps": "2"}
QUIET_S = 0.7  # before the attack


@dataclass
class Watch:
    """Seconds of each edit and of each probe, and the statuses of the edits; `quiet` is the same before the attack."""

    edits: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    quiet: Watch | None = None

    @property
    def slowdown(self) -> float:
        """How many times as long as a usual quiet edit the slowest one took."""
        assert self.quiet is not None
        return max(self.edits) / median(self.quiet.edits)

    def edit(self, client: httpx.Client, picture: bytes) -> None:
        began = time.monotonic()
        self.statuses.add(client.post("/v1/images/edits", data=NEIGHBOUR, files={"image": picture}).status_code)
        self.edits.append(time.monotonic() - began)

    def probe(self, client: httpx.Client, picture: bytes) -> None:
        began = time.monotonic()
        client.get("/health/live").raise_for_status()
        self.probes.append(time.monotonic() - began)
        time.sleep(0.05)


def _watch(url: str, key: str, ready: Any, over: Any, told: Any) -> None:
    """In the other process: one of each to connect, some while all is quiet, then until it is over."""
    picture, headers = saved(scene()), {"Authorization": f"Bearer {key}"}
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=120)) for _ in range(2)]

        def both(until_set: Any) -> Watch:
            watch = Watch()

            def again(act: Any, client: httpx.Client) -> None:
                act(client, picture)
                while not until_set.is_set():
                    act(client, picture)

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(again, (watch.edit, watch.probe), clients))
            return watch

        now, soon = threading.Event(), threading.Event()
        now.set()
        both(now)
        threading.Timer(QUIET_S, soon.set).start()
        quiet = both(soon)
        ready.set()
        watch = both(over)
    watch.quiet = quiet
    told.send(watch)


@contextmanager
def watched(server: Command, key: str) -> Iterator[Watch]:
    """An ordinary client and a probe in loops of their own until the block ends; then what they saw."""
    context = get_context("spawn")
    ready, over = context.Event(), context.Event()
    told, end = context.Pipe(duplex=False)
    process = context.Process(target=_watch, args=(server.url, key, ready, over, end), daemon=True)
    process.start()
    end.close()
    watch = Watch()
    try:
        until(lambda: ready.is_set() or not process.is_alive(), 120)
        yield watch
    finally:
        over.set()
        try:
            assert told.poll(150), "the neighbour is still waiting"
            vars(watch).update(vars(told.recv()))  # EOFError: it has ended by an error, which it has printed
        finally:
            told.close()
            process.terminate()
            process.join(30)
