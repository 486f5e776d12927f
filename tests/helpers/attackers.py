"""Clients in loops, for a long run: those who mean harm and a probe, each in a process of its own."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
from hostile import progressive, raw_png, saved, scene
from http_server import CHAT, EDITS
from PIL import Image

KEYS = ("sk-ordinary", "sk-hostile")
ORDINARY, HOSTILE = ({"Authorization": f"Bearer {key}"} for key in KEYS)
PROMPT = "the marker of a private prompt, " + "word " * 40
PICTURE = saved(scene())
ZEROS = {side: bytes(side * (side * 3 + 1)) for side in (5792, 8192)}
BOMBS = [
    progressive(4096, 1000), progressive(2048, 90), b"x" * 2**22, raw_png(8192, 8192, ZEROS[8192]),
    raw_png(5792, 5792, ZEROS[5792]), raw_png(2048, 2048, bytes(2048 * (2048 * 8 + 1)), depth=16, color=6),
    saved(Image.new("RGB", (4096, 4096)), "WEBP", lossless=True, method=0, quality=0),
]  # fmt: skip
JSON_BOMB = b'{"messages":[' + b"[]," * 2**23 + b"[]]}"


class Lost(Exception):
    """An ordinary client did not get what it asked for."""


class Clients:
    """Loops of requests in threads, and what was counted."""

    def __init__(self) -> None:
        self.over, self.began = threading.Event(), time.monotonic()
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    def loop(self, work: Callable[[], None], pause_s: float, ordinary: bool = False) -> threading.Thread:
        """Do it until the end, in a thread."""

        def run() -> None:
            while not self.over.wait(pause_s * random.random()):
                try:
                    work()
                except (httpx.HTTPError, OSError, Lost) as error:
                    if ordinary:
                        self.lost.append(f"{self.now():.0f} s, {work.__name__}: {type(error).__name__} {error}"[:300])

        thread = threading.Thread(target=run, name=work.__name__)
        thread.start()
        return thread

    def now(self) -> float:
        return time.monotonic() - self.began


class Hostile(Clients):
    """Those of one key who mean harm, in a process of their own: what they cost themselves delays nobody."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def bomb(self) -> None:
        picture, some = random.choice(BOMBS), random.choice((1, 1, 16))
        reply = httpx.post(self.url + EDITS, data={"prompt": PROMPT, "steps": "1", "size": "64x64"},
                           files=[("image[]", ("a", picture, "image/png"))] * some, headers=HOSTILE,
                           timeout=120)  # fmt: skip
        self.counts[f"bomb {reply.status_code}"] += 1

    def json_bomb(self) -> None:
        headers = HOSTILE | {"Content-Type": "application/json"}
        reply = httpx.post(self.url + CHAT, content=JSON_BOMB, headers=headers, timeout=60)
        self.counts[f"JSON bomb {reply.status_code}"] += 1

    def cancel(self) -> None:
        """Ask, and hang up at any moment."""
        picture = random.choice([PICTURE] * 8 + BOMBS)
        with httpx.Client(timeout=random.choice((0.02, 0.1, 0.5, 1.5))) as client, suppress(httpx.TransportError):
            client.post(self.url + EDITS, data={"prompt": PROMPT, "steps": "60"}, files={"image": picture},
                        headers=HOSTILE)  # fmt: skip
        self.counts["cancelled"] += 1

    def flood(self) -> None:
        """Thirty at once that hang up as soon as they have asked."""
        made = httpx.Request("POST", self.url + EDITS, data={"prompt": PROMPT, "steps": "60"},
                             files={"image": PICTURE}, headers=HOSTILE)  # fmt: skip
        head = f"POST {EDITS} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in made.headers.items())
        with ExitStack() as stack:
            for _ in range(30):
                self.connect(stack, head.encode() + b"\r\n" + made.read())
                self.counts["flood"] += 1
            time.sleep(random.random() / 2)

    def idle(self) -> None:
        """Connections that say nothing, half of a head, or ask and do not read."""
        with ExitStack() as stack:
            ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-hostile\r\n\r\n"
            for words in [b"", b"GET /v1/mod", ask * 60] * 20:
                self.connect(stack, words)
                self.counts["idle or slow connections"] += 1
            self.over.wait(6)

    def connect(self, stack: ExitStack, words: bytes) -> None:
        place = urlsplit(self.url)
        one = stack.enter_context(socket.create_connection((place.hostname or "", place.port or 0), timeout=5))
        one.sendall(words)

    def start(self) -> list[threading.Thread]:
        return [self.loop(work, pause_s) for work, pause_s in (
            (self.bomb, 1.0), (self.bomb, 3.0), (self.json_bomb, 4.0), (self.cancel, 0.5), (self.cancel, 0.5),
            (self.flood, 4.0), (self.idle, 2.0))]  # fmt: skip


def attack(url: str, ready: Any, over: Any, counts: Any) -> None:
    """In a process of its own."""
    clients = Hostile(url)
    ready.wait()
    threads = clients.start()
    over.wait()
    clients.over.set()
    for thread in threads:
        thread.join(150)
    counts.put((clients.counts, [thread.name for thread in threads if thread.is_alive()]))


def probe(urls: dict[str, str], ready: Any, over: Any, found: Any) -> None:
    """In a process of its own: when (monotonic), how long `/health/live` took, and of whom."""
    taken: list[tuple[float, float, str]] = []
    ready.wait()
    with httpx.Client(timeout=30) as client:
        while not over.wait(0.1):
            for name, url in urls.items():
                start = time.monotonic()
                client.get(url + "/health/live").raise_for_status()
                taken.append((start, time.monotonic() - start, name))
            if len(taken) % 20 == 0:
                found.put(taken[-20:])
    found.put(taken[len(taken) // 20 * 20 :])
