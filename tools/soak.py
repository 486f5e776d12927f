"""Everything at once: ordinary clients beside bombs, slow readers, idle connections, cancels, a full disk, kills.

    sudo env PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 python tools/soak.py --minutes 60 --chart soak.png

Two servers of the real command: one that repaints pictures, one that makes videos, whose store is a tmpfs of 16 MiB
(hence root). Each engine is killed twice, and the store is full for a minute. An ordinary client asks again after a
503, as long as it says; its pictures must be those that it got before all began. Memory and descriptors are compared by
their medians in the second sixth of the time and in the last. Prints progress, a table and one JSON line; exit code 0
if nothing was lost, `/health/live` answered within a second, nothing grew, and no log has a prompt.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from statistics import median
from typing import Any

import httpx
import numpy as np
from attackers import KEYS, ORDINARY, PICTURE, PROMPT, Clients, Lost, attack, probe
from http_server import CHAT, EDITS, Command, command, repaint_folder, video_folder
from PIL import Image

LIVE_S = 1.0
GROWTH = {"fds": 8.0, "decoders": 256.0, "MiB": 32.0}  # decoders are ended in the middle of something large
STORE_MB, FULL_S, TRIES = 16, 60.0, 200
EVENTS = {"kill 1": 0.35, "full": 0.55, "kill 2": 0.75}  # when, as a share of the time
ASKED: list[dict[str, str]] = [
    {"steps": "4", "seed": "1"},
    {"steps": "6", "seed": "2", "size": "128x96", "cache[backend]": "magcache"},
    {"steps": "9", "seed": "3", "n": "2", "strength": "0.7"},
    {"steps": "3", "seed": "4", "output_format": "webp", "priority": "1"},
]


class Soak(Clients):
    """Ordinary clients, the accidents, and what is measured."""

    def __init__(self, editor: Command, filmer: Command, store: Path, seconds: float) -> None:
        super().__init__()
        self.editor, self.filmer, self.store, self.seconds, self.full = editor, filmer, store, seconds, False
        self.edits: list[tuple[float, float]] = []  # when, and how long
        self.live: list[tuple[float, float, str]] = []
        self.samples: list[dict[str, float]] = []
        self.pictures: dict[int, list[np.ndarray]] = {}

    def ask(self, what: str, **request: Any) -> httpx.Response:
        """An ordinary client's request, again as long as the answer is a 503; Lost for any other failure."""
        for _ in range(TRIES):
            began = time.monotonic()
            reply = httpx.request(**request, headers=ORDINARY, timeout=120)
            if reply.status_code == 200:
                self.counts[f"{what} served"] += 1
                if what != "video":
                    self.edits.append((self.now(), time.monotonic() - began))
                return reply
            if reply.status_code != 503 or "retry-after" not in reply.headers:
                raise Lost(f"{reply.status_code} {reply.text[:200]}")
            self.counts[f"{what} again: {reply.json()['error']['code']}"] += 1
            time.sleep(float(reply.headers["retry-after"]))
        raise Lost(f"still {reply.text[:200]}")

    def edit(self, number: int | None = None) -> None:
        """An ordinary client: pictures, the same as it got at the beginning."""
        number = random.randrange(len(ASKED)) if number is None else number
        reply = self.ask("edit", method="POST", url=self.editor.url + EDITS, data=ASKED[number] | {"prompt": PROMPT},
                         files={"image": PICTURE})  # fmt: skip
        made = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in reply.json()["data"]]
        for one, first in zip(made, self.pictures.setdefault(number, made), strict=True):
            if np.abs(one.astype(int) - first).max() > (1 if ASKED[number].get("output_format") is None else 40):
                raise Lost(f"another picture for {ASKED[number]}")

    def chat(self) -> None:
        """The same through the chat route."""
        url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
        content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}], "steps": 3, "seed": 1}
        self.ask("chat", method="POST", url=self.editor.url + CHAT, json=body)

    def film(self) -> None:
        """An ordinary client: a video, asked for again if the disk was full meanwhile."""
        for _ in range(TRIES):
            full = self.full
            made = self.ask("video", method="POST", url=self.filmer.url + "/v1/videos",
                            json={"prompt": PROMPT, "seed": 1}).json()  # fmt: skip
            place, until = f"{self.filmer.url}/v1/videos/{made['id']}", time.monotonic() + 120
            while made["status"] in ("queued", "in_progress") and time.monotonic() < until:
                time.sleep(0.2)
                made = httpx.get(place, headers=ORDINARY, timeout=30).json()
            self.counts[f"video {made['status']}"] += 1
            if made["status"] == "completed":
                size = len(httpx.get(place + "/content", headers=ORDINARY, timeout=30).raise_for_status().content)
                if size < 500:
                    raise Lost(f"a video of {size} bytes")
            httpx.delete(place, headers=ORDINARY, timeout=30).raise_for_status()
            if made["status"] == "completed":
                return
            if not (full or self.full) or made["error"]["code"] != "store_failed":
                raise Lost(f"video: {made}")
            time.sleep(1)

    def kill(self) -> None:
        for server in (self.editor, self.filmer):
            for number, line in children(server.process.pid):
                if "engine.process" in line:
                    os.kill(number, signal.SIGKILL)
                    self.counts["kills"] += 1

    def fill(self) -> None:
        """No room in the store for a minute."""
        self.full = True
        filler, until = self.store / "filler", self.now() + min(FULL_S, self.seconds / 8)
        with filler.open("wb", buffering=0) as file:
            while self.now() < until and not self.over.wait(0.05):
                with suppress(OSError):  # what clients delete makes room again
                    while file.write(bytes(4096)):
                        pass
        self.counts["MiB of filler"] = filler.stat().st_size >> 20
        filler.unlink()
        self.over.wait(5)  # what was begun meanwhile may still fail
        self.full = False

    def sample(self) -> None:
        """MiB and descriptors of each process."""
        found: dict[str, float] = {"at": self.now()}
        for name, server in (("editor", self.editor), ("filmer", self.filmer)):
            roles = {"front end": [server.process.pid], "engine": [], "decoders": []}
            for number, line in children(server.process.pid):
                roles["engine" if "engine.process" in line else "decoders"].append(number)
            for role, numbers in roles.items():
                with suppress(OSError):  # it was killed just now
                    found[f"{name} {role} MiB"] = sum(map(resident, numbers)) / 2**20
                    if role != "decoders":
                        found[f"{name} {role} fds"] = sum(len(os.listdir(f"/proc/{n}/fd")) for n in numbers)
        self.samples.append(found)
        self.take_probes()
        if len(self.samples) % 12 == 1:
            shown = " ".join(f"{name}={value:.0f}" for name, value in found.items() if "MiB" in name)
            slow = max((taken for at, taken, _ in self.live if at > found["at"] - 60), default=0.0)
            counted = f"served {len(self.edits)} lost {len(self.lost)} live<={slow:.2f}"
            print(f"{found['at']:6.0f} s  {counted} {shown}", flush=True)

    def run(self) -> dict[str, Any]:
        for number in range(len(ASKED)):  # what is right
            self.edit(number)
        others, urls = get_context("spawn"), {"editor": self.editor.url, "filmer": self.filmer.url}
        ready, over, self.probes, counted = others.Barrier(3), others.Event(), others.Queue(), others.Queue()
        apart = [others.Process(target=attack, args=(self.editor.url, ready, over, counted)),
                 others.Process(target=probe, args=(urls, ready, over, self.probes))]  # fmt: skip
        for process in apart:
            process.start()
        ready.wait(120)
        self.began, self.edits, every = time.monotonic(), [], min(5.0, self.seconds / 120)
        threads = [self.loop(work, pause_s, ordinary=True) for work, pause_s in (
            (self.edit, 0.5), (self.edit, 1.0), (self.chat, 1.0), (self.film, 1.0))]  # fmt: skip
        todo = [(share * self.seconds, self.kill if "kill" in name else self.fill) for name, share in EVENTS.items()]
        for turn in count():
            if self.now() > self.seconds:
                break
            self.sample()
            while todo and todo[0][0] <= self.now():
                threading.Thread(target=todo.pop(0)[1]).start()
            self.over.wait(max(0.0, self.began + (turn + 1) * every - time.monotonic()))
        self.over.set()
        over.set()
        for thread in threads:
            thread.join(150)
        counts, hanging = counted.get(timeout=200)
        self.counts.update(counts)
        for process in apart:
            process.join(20)
        self.take_probes()
        return self.told([*hanging, *(thread.name for thread in threads if thread.is_alive())])

    def take_probes(self) -> None:
        while True:
            try:
                self.live += [(at - self.began, taken, name) for at, taken, name in self.probes.get(timeout=0.05)]
            except Empty:
                return

    def told(self, hanging: list[str]) -> dict[str, Any]:
        taken = sorted(taken for _, taken in self.edits)
        live = {name: sorted(taken for _, taken, of in self.live if of == name) for name in ("editor", "filmer")}
        names = sorted({name for one in self.samples for name in one} - {"at"})
        windows = [(1 / 6, 1 / 3), (5 / 6, 1.0)]
        level = {name: [self.median(name, *window) for window in windows] for name in names}
        grown = [name for name, (before, after) in level.items()
                 if after > before + next(most for kind, most in GROWTH.items() if kind in name)]  # fmt: skip
        logs = [server.log.read_text(errors="replace") for server in (self.editor, self.filmer)]
        told = {
            "seconds": round(self.now()), "counts": dict(sorted(self.counts.items())), "lost": self.lost,
            "edit_s": {"median": at_share(taken, 0.5), "p99": at_share(taken, 0.99), "max": at_share(taken, 1.0)},
            "live_s": {name: {"median": at_share(one, 0.5), "p99": at_share(one, 0.99), "max": at_share(one, 1.0),
                              "late": sum(taken > LIVE_S for taken in one), "all": len(one)}
                       for name, one in live.items()},
            "level": level, "grown": grown, "hanging": hanging, "log_bytes": [len(log) for log in logs],
            "prompt_in_a_log": any("marker of a private" in log.lower() for log in logs),
            "tracebacks": sum(log.count("Traceback (most recent") for log in logs),
        }  # fmt: skip
        bad = bool(self.lost or grown or hanging or told["prompt_in_a_log"] or told["tracebacks"])
        return told | {"holds": not bad and max(map(max, live.values())) <= LIVE_S and self.counts["kills"] == 4}

    def median(self, name: str, begin: float, end: float) -> float:
        """Of the samples between two shares of the time."""
        found = [one[name] for one in self.samples if name in one and begin <= one["at"] / self.seconds <= end]
        return round(median(found), 1) if found else 0.0

    def draw(self, file: Path) -> None:
        from matplotlib import pyplot

        figure, (memory, handles, delay) = pyplot.subplots(3, 1, figsize=(10, 11), sharex=True, layout="constrained")
        for name in sorted({name for one in self.samples for name in one} - {"at"}):
            points = [(one["at"] / 60, one[name]) for one in self.samples if name in one]
            (handles if "fds" in name else memory).plot(*zip(*points, strict=True), label=name, linewidth=1)
        for label, points in (("edits and chats", self.edits), ("/health/live", self.live)):
            delay.plot(
                [point[0] / 60 for point in points], [point[1] for point in points], ".", markersize=2, label=label
            )
        delay.set(yscale="log", ylabel="seconds", xlabel="minutes")
        memory.set_ylabel("resident MiB")
        handles.set_ylabel("descriptors")
        for axes in (memory, handles, delay):
            axes.legend(fontsize=7)
            for name, share in EVENTS.items():
                axes.axvline(share * self.seconds / 60, color="gray", linewidth=0.5)
                axes.text(share * self.seconds / 60, axes.get_ylim()[1], name, fontsize=7)
        figure.savefig(file, dpi=120)


def at_share(values: list[float], share: float) -> float:
    """Of sorted values, the one that this share of them does not exceed."""
    return round(values[min(len(values) - 1, int(share * len(values)))], 3) if values else 0.0


def children(pid: int) -> Iterator[tuple[int, str]]:
    """Number and command line of each."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            for number in map(int, (task / "children").read_text().split()):
                yield number, Path(f"/proc/{number}/cmdline").read_text()


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORE_MB}m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--logs", type=Path, help="a folder for the servers' logs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        for each in ("a", "b"):
            (folder / each).mkdir()
        store = stack.enter_context(small_disk(folder / "store"))
        models = repaint_folder(folder), video_folder(folder)
        keys = ("--api-key", *KEYS, "--client-timeout", "5")
        editor = stack.enter_context(command(folder / "a", models[0], *keys, "--cache-backend", "magcache"))
        filmer = stack.enter_context(command(folder / "b", models[1], *keys, "--store-dir", store))
        soak = Soak(editor, filmer, store, 60 * args.minutes)
        told = soak.run()
        if args.chart:
            soak.draw(args.chart)
        if args.logs:
            args.logs.mkdir(exist_ok=True)
            for server, role in ((editor, "editor"), (filmer, "filmer")):
                (args.logs / f"{role}.log").write_bytes(server.log.read_bytes())
    for kind, number in told["counts"].items():
        print(f"{kind:32} {number:8}")
    for kind, (before, after) in told["level"].items():
        print(f"{kind:32} {before:8} -> {after}")
    print(json.dumps({"minutes": args.minutes} | told))
    return 0 if told["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
