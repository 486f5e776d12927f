"""Everything at once: ordinary clients beside bombs, slow readers, idle connections, cancels, a full disk, kills.

    PYTHONPATH=.:tests/helpers python tools/soak.py --minutes 60

Two servers of the real command: one that repaints pictures, one that makes videos. Prints a table, then one JSON line;
exit code 0 if every ordinary client got what it asked for (asked again only after a kill, a full queue or a full disk),
`/health/live` answered within a second, memory and descriptors stayed level, and no log has a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from hostile import progressive, raw_png, saved, scene
from http_server import EDITS, Command, command, repaint_folder, video_folder

KEYS = ("sk-ordinary", "sk-hostile")
ORDINARY, HOSTILE = ({"Authorization": f"Bearer {key}"} for key in KEYS)
PROMPT = "the marker of a private prompt, " + "word " * 40
AGAIN = {503}  # a kill, a full queue, a full disk: each names when to ask again
LIVE_S, GROWTH, DESCRIPTORS = 1.0, 1.25, 16


class Soak:
    """What runs, and what was counted."""

    def __init__(self, editor: Command, filmer: Command, seconds: float) -> None:
        self.editor, self.filmer, self.over = editor, filmer, threading.Event()
        self.seconds, self.full = seconds, False
        self.counts: Counter[str] = Counter()
        self.slowest = {"edit": 0.0, "live": 0.0}
        self.lost: list[str] = []

    def loop(self, work: Callable[[], None], pause_s: float) -> threading.Thread:
        """Do it until the end, in a thread."""

        def run() -> None:
            while not self.over.wait(pause_s * random.random()):
                with suppress(httpx.TransportError, OSError):
                    work()

        thread = threading.Thread(target=run, name=work.__name__)
        thread.start()
        return thread

    def edit(self) -> None:
        """An ordinary client: a picture, asked for until it is there."""
        began, fields = time.monotonic(), {"prompt": PROMPT, "steps": "6", "seed": "1"}
        for _ in range(60):
            reply = httpx.post(self.editor.url + EDITS, data=fields, files={"image": saved(scene())}, headers=ORDINARY,
                               timeout=60)  # fmt: skip
            self.counts[f"edit {reply.status_code}"] += 1
            if reply.status_code == 200:
                self.slowest["edit"] = max(self.slowest["edit"], time.monotonic() - began)
                return
            if reply.status_code not in AGAIN:
                self.lost.append(f"edit: {reply.status_code} {reply.text[:200]}")
                return
            self.over.wait(float(reply.headers.get("retry-after", 1)))
            began = time.monotonic()

    def film(self) -> None:
        """An ordinary client: a video, asked for until it is there; a job may fail with its reason on a full disk."""
        full = self.full
        made = httpx.post(self.filmer.url + "/v1/videos", json={"prompt": PROMPT, "seed": 1}, headers=ORDINARY)
        self.counts[f"video {made.status_code}"] += 1
        status = {"status": "refused"} if made.status_code == 503 else made.json()
        until = time.monotonic() + 60
        while status["status"] in ("queued", "in_progress") and time.monotonic() < until:
            self.over.wait(0.2)
            status = httpx.get(f"{self.filmer.url}/v1/videos/{made.json()['id']}", headers=ORDINARY).json()
        self.counts[f"video {status['status']}"] += 1
        if status["status"] != "completed" and not (full or self.full):
            self.lost.append(f"video: {status}")
        if made.status_code == 200:
            httpx.delete(f"{self.filmer.url}/v1/videos/{made.json()['id']}", headers=ORDINARY).raise_for_status()

    def probe(self) -> None:
        for server in (self.editor, self.filmer):
            began = time.monotonic()
            httpx.get(server.url + "/health/live", timeout=30).raise_for_status()
            self.slowest["live"] = max(self.slowest["live"], time.monotonic() - began)
            self.counts["probes"] += 1

    def bomb(self) -> None:
        picture = random.choice(BOMBS)
        files = [("image[]", ("a", picture, "image/png"))] * random.choice((1, 16))
        reply = httpx.post(self.editor.url + EDITS, data={"prompt": PROMPT, "steps": "1"}, files=files, headers=HOSTILE,
                           timeout=120)  # fmt: skip
        self.counts[f"bomb {reply.status_code}"] += 1

    def json_bomb(self) -> None:
        body = b'{"messages":[' + b"[]," * 2**23 + b"[]]}"
        headers = HOSTILE | {"Content-Type": "application/json"}
        reply = httpx.post(self.editor.url + "/v1/chat/completions", content=body, headers=headers, timeout=60)
        self.counts[f"JSON bomb {reply.status_code}"] += 1

    def cancel(self) -> None:
        """Ask, and hang up at any moment."""
        picture = random.choice([saved(scene()), *BOMBS])
        with httpx.Client(timeout=random.choice((0.02, 0.1, 0.5, 1.5))) as client, suppress(httpx.TimeoutException):
            client.post(self.editor.url + EDITS, data={"prompt": PROMPT, "steps": "60"}, files={"image": picture},
                        headers=HOSTILE)  # fmt: skip
        self.counts["cancelled"] += 1

    def idle(self) -> None:
        """Connections that say nothing, half of a head, or ask and do not read."""
        place = urlsplit(self.editor.url)
        with ExitStack() as stack:
            for words in [b"", b"GET /v1/mod", b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20] * 20:
                one = stack.enter_context(socket.create_connection((place.hostname or "", place.port or 0), timeout=5))
                one.sendall(words)
                self.counts["idle connections"] += 1
            self.over.wait(5)

    def kill(self) -> None:
        """The engine of the repainting server."""
        for number in children(self.editor.process.pid):
            if "engine.process" in Path(f"/proc/{number}/cmdline").read_text():
                os.kill(number, signal.SIGKILL)
                self.counts["kills"] += 1

    def fill(self, full: bool) -> None:
        """No file of the video server may grow, as on a full disk."""
        self.full = True
        most = 0 if full else resource.RLIM_INFINITY
        resource.prlimit(self.filmer.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        if not full:
            self.over.wait(5)  # what was begun on the full disk may still fail
            self.full = False

    def sizes(self) -> dict[str, int]:
        """MiB of each process, and descriptors of the front ends."""
        found: dict[str, int] = {}
        for name, server in (("editor", self.editor), ("filmer", self.filmer)):
            found[f"{name} MiB"] = server.status("VmRSS") >> 10
            found[f"{name} descriptors"] = server.descriptors()
        return found

    def run(self) -> dict[str, Any]:
        """All of it; half of the time has passed when memory is measured first."""
        work = [(self.edit, 0.5), (self.edit, 0.5), (self.film, 1.0), (self.probe, 0.2), (self.bomb, 1.0),
                (self.json_bomb, 4.0), (self.cancel, 0.5), (self.cancel, 0.5), (self.idle, 2.0)]  # fmt: skip
        threads, began, before = [self.loop(*one) for one in work], time.monotonic(), {}
        minute = min(60.0, self.seconds / 5)
        at = [(0.25, lambda: before.update(self.sizes())), (0.3, self.kill), (0.45, lambda: self.fill(True)),
              (0.45 + minute / self.seconds, lambda: self.fill(False)), (0.7, self.kill)]  # fmt: skip
        for share, act in sorted(at, key=lambda one: one[0]):
            self.over.wait(max(0.0, began + share * self.seconds - time.monotonic()))
            act()
        self.over.wait(max(0.0, began + self.seconds - time.monotonic()))
        self.over.set()
        for thread in threads:
            thread.join(150)
        time.sleep(8)  # idle connections end
        return {"counts": dict(self.counts), "slowest_s": self.slowest, "lost": self.lost, "before": before,
                "after": self.sizes(), "hanging": [t.name for t in threads if t.is_alive()]}  # fmt: skip


BOMBS = [progressive(4096, 1000), progressive(2048, 90), raw_png(8192, 8192, bytes(8192 * (8192 * 3 + 1))),
         raw_png(4096, 4096, bytes(4096 * (4096 * 8 + 1)), depth=16, color=6), b"x" * 2**22]  # fmt: skip


def children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        for each in ("a", "b"):
            (folder / each).mkdir()
        models = repaint_folder(folder), video_folder(folder)
        keys = ("--api-key", *KEYS, "--client-timeout", "5", "--disable-uvicorn-access-log")
        editor = stack.enter_context(command(folder / "a", models[0], *keys))
        store = ("--store-dir", folder / "b" / "store")
        filmer = stack.enter_context(command(folder / "b", models[1], *keys, *store))
        told = Soak(editor, filmer, 60 * minutes).run()
        told["prompt in a log"] = any("marker of a private" in one.log.read_text().lower() for one in (editor, filmer))
    before, after = told["before"], told["after"]
    level = all(after[name] <= before[name] * GROWTH + 64 for name in before if "MiB" in name)
    level &= all(after[name] <= before[name] + DESCRIPTORS for name in before if "descriptors" in name)
    live = told["slowest_s"]["live"] <= LIVE_S
    told["holds"] = bool(level and live and not (told["lost"] or told["prompt in a log"] or told["hanging"]))
    for name, count in sorted(told["counts"].items()):
        print(f"{name:24} {count:8}")
    for name in before:
        print(f"{name:24} {before[name]:8} -> {after[name]}")
    print(json.dumps({"minutes": minutes} | told))
    return 0 if told["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
