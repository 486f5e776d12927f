"""Decodes pictures of strangers in processes of their own, each with a limit of memory and of processor time.

Headers are read first: the pixels that all pictures of a request announce together are limited before one is decoded.
A request of few pixels goes through a lane of its own, so that it never waits behind large ones; a large one whose
client has left is killed. `python -m vllm_omni.entrypoints.openai.decoding` is such a process; it imports nothing of
the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from PIL import Image, PngImagePlugin

from vllm_omni.errors import InvalidValueError
from vllm_omni.outputs.media import announced, open_image, open_mask

SMALL_PIXELS = 4 * 2**20
_MEMORY = 320 * 2**20  # address space of such a process, besides what pixels take:
_BYTES_PER_PIXEL = 8  # reserved by opening a WebP of any lane; and again by turning a picture and laying it on white


class Given(NamedTuple):
    """A picture as it came."""

    field: str
    mask: bool
    data: bytes


class Refusal(NamedTuple):
    """Why pictures are not taken; `field` is the client's name of one."""

    field: str
    text: str


_LARGE = Refusal("", "more than the lane of small pictures takes")


class Decoder:
    """Two lanes of processes, which start when they are needed. `close` ends what runs."""

    def __init__(self, max_pixels: int) -> None:
        self._lanes = (_Lane(2, min(SMALL_PIXELS, max_pixels), 3, max_pixels), _Lane(1, max_pixels, 15, max_pixels))

    async def decode(self, pictures: Sequence[Given], max_pixels: int) -> list[Image.Image] | Refusal:
        """Upright RGB pictures, masks in shades of gray.

        `max_pixels`: how many all may have together. Cancelling it kills the process that decodes large pictures.
        """
        small, large = self._lanes
        answer = await small.run(pictures, max_pixels)
        return await large.run(pictures, max_pixels) if answer == _LARGE else answer

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()


@dataclass
class _Job:
    pictures: Sequence[Given]
    max_pixels: int
    gone: bool = False
    process: subprocess.Popen[bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kill(self) -> None:
        """End the process that decodes it; nobody wants the result any more."""
        with self.lock:
            self.gone = True
            if self.process is not None:
                self.process.kill()


class _Lane:
    """Threads, each with a process that decodes one request at a time."""

    def __init__(self, workers: int, pixels: int, seconds: int, max_pixels: int) -> None:
        self._limits = pixels, seconds, _MEMORY + _BYTES_PER_PIXEL * (pixels + max_pixels)
        self._kill = pixels > SMALL_PIXELS  # a small one has ended before a new process would have started
        self._threads = ThreadPoolExecutor(workers, "vllm-omni-decode")
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()

    async def run(self, pictures: Sequence[Given], max_pixels: int) -> list[Image.Image] | Refusal:
        job = _Job(pictures, max_pixels)
        try:
            return await asyncio.wrap_future(self._threads.submit(self._decode, job))
        finally:
            if self._kill:
                job.kill()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in [*self._processes]:
            process.kill()

    def _decode(self, job: _Job) -> list[Image.Image] | Refusal:
        """In a thread. What went wrong is returned: an exception would keep its frames, and they the pictures."""
        process = self._process()
        with job.lock:
            if job.gone:
                return Refusal("", "")
            job.process = process
        try:
            answer = _ask(process, job)
        except (OSError, ValueError):  # it has died: by its limits, or because the client has left
            answer = Refusal(job.pictures[0].field, "cannot be decoded within this server's limits")
            process.kill()
        with job.lock:
            job.process = None
        return answer

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = vars(self._own).get("process")
        if process is None or process.poll() is not None:
            self._processes.discard(process)  # type: ignore[arg-type]
            line = [sys.executable, "-m", __spec__.name, *map(str, self._limits)]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._own.process = process
            self._processes.add(process)
        return process


def _ask(process: subprocess.Popen[bytes], job: _Job) -> list[Image.Image] | Refusal:
    """Send a job and read the answer: a line of JSON, then bytes, both ways. ValueError if there is none."""
    into, out = process.stdin, process.stdout
    assert into is not None and out is not None
    _send(into, [job.max_pixels, [(*given[:2], len(given.data)) for given in job.pictures]])
    for given in job.pictures:
        into.write(given.data)
    into.flush()
    refused, sizes = json.loads(out.readline())
    if refused:
        return Refusal(*refused)
    pictures = []
    for mode, width, height in sizes:
        pictures.append(Image.frombytes(mode, (width, height), out.read(width * height * len(mode))))
    return pictures


def _send(to: IO[bytes], value: Any) -> None:
    to.write(json.dumps(value).encode() + b"\n")


def _work(job: list[Any], data: list[bytes], lane_pixels: int) -> tuple[Refusal | None, list[Image.Image]]:
    most, given = job
    pixels = cost = 0
    try:
        for (name, _, _), content in zip(given, data, strict=True):
            more = announced(content, name)
            pixels, cost = pixels + more[0], cost + more[1]
            if pixels > most:
                text = f"pictures of one request may have at most {most} pixels together, these have more"
                return Refusal(name, text), []
        if cost > lane_pixels and lane_pixels <= SMALL_PIXELS:
            return _LARGE, []
        pictures = []
        for i, (name, mask, _) in enumerate(given):
            pictures.append((open_mask if mask else open_image)(data[i], name, most))
            data[i] = b""
            if min(pictures[-1].size) < 2:
                return Refusal(name, "a picture must have at least 2x2 pixels"), []
        return None, pictures
    except InvalidValueError as error:
        return Refusal(name, str(error)), []


def main() -> None:
    """Decode what comes on standard input until it ends."""
    lane_pixels, seconds, memory = map(int, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the server decides when it ends
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20
    os.nice(5)
    into, out = sys.stdin.buffer, sys.stdout.buffer
    while line := into.readline():
        job = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
        refusal, pictures = _work(job, [into.read(given[2]) for given in job[1]], lane_pixels)
        _send(out, [refusal, [(picture.mode, *picture.size) for picture in pictures]])
        while pictures:
            out.write(pictures.pop(0).tobytes())
        out.flush()


if __name__ == "__main__":
    main()
