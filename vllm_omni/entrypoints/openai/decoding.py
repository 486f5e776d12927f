"""Decodes pictures of strangers in processes of their own, each with a limit of memory and of processor time.

Headers are read first: the pixels that all pictures of a request announce together are limited before one is decoded.
A request of few pixels and bytes goes through a lane of its own, so that it never waits behind large ones, which also
run at a lower priority; a large one whose client has left is killed. `decoder_process.py` is the other end.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from typing import NamedTuple

from vllm_omni.engine.pictures import PackedPicture, Sent, SharedMemory, SharedPicture, shared_bytes
from vllm_omni.entrypoints.openai import decoder_process
from vllm_omni.entrypoints.openai.decoder_process import LARGE, SMALL_PIXELS
from vllm_omni.entrypoints.openai.protocol.errors import unavailable
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

SMALL_BYTES = 8 * 2**20  # of all files of a request: more go straight to the lane of large ones
_MEMORY = 320 * 2**20  # address space of such a process, besides what pixels take:
_BYTES_PER_PIXEL = 8  # reserved by opening a WebP of any lane; and again by turning a picture and laying it on white
WAITING = 8  # requests with as many pixels as one may have, whose pictures, or files, may be in memory at a time
_FULL, _RETRY_S = "no room", 5.0
_NICENESS = 5  # of the process for large pictures


class Given(NamedTuple):
    """A picture as it came."""

    field: str
    mask: bool
    data: bytes


class Refusal(NamedTuple):
    """Why pictures are not taken; `field` is the client's name of one."""

    field: str
    text: str


class Decoder:
    """Two lanes of processes; those for small pictures start at once. `close` ends what runs."""

    def __init__(self, max_pixels: int) -> None:
        self._lanes = (_Lane(2, min(SMALL_PIXELS, max_pixels), 3, max_pixels), _Lane(1, max_pixels, 15, max_pixels))

    async def decode(self, pictures: Sequence[Given], max_pixels: int) -> list[Sent] | Refusal:
        """Upright RGB pictures, masks in shades of gray.

        `max_pixels`: how many all may have together. Cancelling it kills the process that decodes large pictures.
        ApiError 503 while too many large ones, or files that wait, are in memory, or no descriptor is free.
        """
        small, large = self._lanes
        answer: list[Sent] | Refusal = Refusal("", LARGE)
        if sum(len(given.data) for given in pictures) <= SMALL_BYTES:
            answer = await small.run(pictures, max_pixels)
        if isinstance(answer, Refusal) and answer.text == LARGE:
            answer = await large.run(pictures, max_pixels)
        if isinstance(answer, Refusal) and answer.text == _FULL:
            text = "no picture can be decoded now: those of other requests fill the memory, or descriptors have run out"
            raise unavailable(text, "queue_full", _RETRY_S)
        return answer

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
        self._large = pixels > SMALL_PIXELS  # a small one has ended before a new process would have started
        memory = _MEMORY + _BYTES_PER_PIXEL * (pixels + max_pixels)
        self._room, self._waiting = WAITING * 3 * max_pixels, 0  # bytes; of files that wait, or are being decoded
        self._settings = pixels, seconds, memory, _NICENESS if self._large else 0
        self._threads = ThreadPoolExecutor(workers, "vllm-omni-decode")
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._together = threading.Barrier(workers, timeout=10.0)
        for _ in range(0 if self._large else workers):
            self._threads.submit(self._start)

    async def run(self, pictures: Sequence[Given], max_pixels: int) -> list[Sent] | Refusal:
        size = sum(len(given.data) for given in pictures)
        if self._waiting and self._waiting + size + self._decoded() > self._room:
            return Refusal("", _FULL)
        job = _Job(pictures, max_pixels)
        future = self._threads.submit(self._decode, job)
        self._waiting += size
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._waiting -= size
            if future.cancel():
                job.pictures = ()  # the queue keeps the job until its turn
            elif self._large:
                job.kill()

    def _decoded(self) -> int:
        """Bytes of the pictures that this lane has decoded and that share its room."""
        return shared_bytes() if self._large else 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._together.abort()
        ended = [*self._processes]
        for process in ended:
            process.kill()
        for process in ended:
            process.wait()  # or it stays in the table of processes for whoever inherits it

    def _decode(self, job: _Job) -> list[Sent] | Refusal:
        """In a thread. What went wrong is returned: an exception would keep its frames, and they the pictures."""
        if self._decoded() > self._room:
            return Refusal("", _FULL)
        try:
            process = self._process()
            memory = SharedMemory() if self._large and sys.platform == "linux" else None
        except OSError as error:  # no descriptor or no process is free
            logger.warning("pictures cannot be decoded now: %s", error)
            return Refusal("", _FULL)
        with job.lock:
            if job.gone:
                return Refusal("", "")
            job.process = process
        try:
            answer = _ask(process, job, memory)
        except (OSError, ValueError):  # it has died: by its limits, or because the client has left
            answer = Refusal(job.pictures[0].field, "cannot be decoded within this server's limits")
            process.kill()
            if not job.gone:
                logger.warning("a decoder of pictures ended with %d; another one takes its place", process.wait())
        with job.lock:
            job.process = None
        return answer

    def _start(self) -> None:
        """Start this thread's process; the first thread must not take the turn of the others."""
        self._process()
        with suppress(threading.BrokenBarrierError):
            self._together.wait()

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = vars(self._own).get("process")
        if process is None or process.poll() is not None:
            self._processes.discard(process)  # type: ignore[arg-type]
            line = [sys.executable, "-m", decoder_process.__name__, *map(str, self._settings)]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self._own.process = process
            self._processes.add(process)
        return process


def _ask(process: subprocess.Popen[bytes], job: _Job, memory: SharedMemory | None) -> list[Sent] | Refusal:
    """Send a job and read the answer: a line of JSON, then bytes, both ways. ValueError if there is none.

    If there is `memory`, the pixels come in it: the engine takes them from there.
    """
    into, out = process.stdin, process.stdout
    assert into is not None and isinstance(out, BufferedReader)
    sizes = [(*given[:2], len(given.data)) for given in job.pictures]
    into.write(json.dumps([job.max_pixels, sizes, memory.path if memory else ""]).encode() + b"\n")
    for given in job.pictures:
        into.write(given.data)
    into.flush()
    refused, made = json.loads(out.readline())
    if refused:
        return Refusal(*refused)
    pictures: list[Sent] = []
    after = 0
    for mode, width, height in made:
        if memory is not None:
            pictures.append(one := SharedPicture(mode, (width, height), memory, after))
            after = one.after
            continue
        pictures.append(packed := PackedPicture(mode, (width, height)))
        if out.readinto(packed.pixels) != len(packed.pixels):
            raise ValueError("the process has died")
    return pictures
