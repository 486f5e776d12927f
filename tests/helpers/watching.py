"""A neighbour and the probes, while somebody attacks: how long an ordinary edit and `/health/live` take."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from hostile import saved, scene
from http_server import EDITS, Command

NEIGHBOUR = {"prompt": "x", "size": "64x64", "steps": "2"}


@dataclass
class Watch:
    """Seconds of each edit and of each probe, and the statuses of the edits."""

    edits: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)


@contextmanager
def watched(server: Command, key: str, edits: bool = True) -> Iterator[Watch]:
    """An ordinary client and a probe in loops of their own until the block ends."""
    watch, over = Watch(), threading.Event()
    headers, picture = {"Authorization": f"Bearer {key}"}, saved(scene())

    def edit() -> None:
        with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
            while not over.is_set() or not watch.edits:
                began = time.monotonic()
                watch.statuses.add(client.post(EDITS, data=NEIGHBOUR, files={"image": picture}).status_code)
                watch.edits.append(time.monotonic() - began)

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            while not over.is_set() or not watch.probes:
                began = time.monotonic()
                client.get("/health/live").raise_for_status()
                watch.probes.append(time.monotonic() - began)
                time.sleep(0.05)

    threads = [threading.Thread(target=work) for work in ([edit, probe] if edits else [probe])]
    for thread in threads:
        thread.start()
    try:
        yield watch
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
