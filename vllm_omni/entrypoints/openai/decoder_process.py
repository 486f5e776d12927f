"""A process that decodes pictures: `python -m …decoder_process PIXELS SECONDS BYTES NICENESS`.

Started by `decoding.py` alone: jobs come on standard input, a line of JSON and then bytes, and answers go out likewise,
or the pixels go into a file of shared memory that the job names.
It imports nothing of the server, so that it starts in a moment.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from vllm_omni.errors import InvalidValueError
from vllm_omni.outputs.media import announced, open_image, open_mask

SMALL_PIXELS = 4 * 2**20  # a lane for requests of up to as many takes nothing larger
SMALL_S = 0.2  # of processor time: what takes longer is large, whatever its header says
LARGE = "more than the lane of small pictures takes"


class _Late(BaseException):
    """SMALL_S have passed. No `except Exception` of a library is to take it for a fault of the file."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Late


def _work_shortly(
    job: list[Any], data: list[bytes], lane_pixels: int
) -> tuple[tuple[str, str] | None, list[Image.Image]]:
    """In the lane of small pictures."""
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, SMALL_S, SMALL_S / 4)  # again, should a callback have swallowed it
            return _work(job, data, lane_pixels)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _Late:
        return ("", LARGE), []


def _work(job: list[Any], data: list[bytes], lane_pixels: int) -> tuple[tuple[str, str] | None, list[Image.Image]]:
    most, given, _ = job
    pixels = cost = 0
    try:
        for (name, _, _), content in zip(given, data, strict=True):
            more = announced(content, name)
            pixels, cost = pixels + more[0], cost + more[1]
            if pixels > most:
                text = f"pictures of one request may have at most {most} pixels together, these have more"
                return (name, text), []
        if cost > lane_pixels and lane_pixels <= SMALL_PIXELS:
            return ("", LARGE), []
        pictures = []
        for i, (name, mask, _) in enumerate(given):
            pictures.append((open_mask if mask else open_image)(data[i], name, most))
            data[i] = b""
            if min(pictures[-1].size) < 2:
                return (name, "a picture must have at least 2x2 pixels"), []
        return None, pictures
    except InvalidValueError as error:
        return (name, str(error)), []


def _put(pictures: list[Image.Image], into: BinaryIO) -> None:
    """Write the pixels, and forget them."""
    while pictures:
        into.write(pictures.pop(0).tobytes())


def main() -> None:
    """Decode what comes on standard input until it ends."""
    lane_pixels, seconds, memory, niceness = map(int, sys.argv[1:])
    small = lane_pixels <= SMALL_PIXELS
    signal.signal(signal.SIGPROF, _stop if small else signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the server decides when it ends
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20
    os.nice(niceness)
    into, out = sys.stdin.buffer, sys.stdout.buffer
    while line := into.readline():
        job = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
        files = [into.read(given[2]) for given in job[1]]
        refusal, pictures = _work_shortly(job, files, lane_pixels) if small else _work(job, files, lane_pixels)
        del files
        answer = json.dumps([refusal, [(picture.mode, *picture.size) for picture in pictures]]).encode() + b"\n"
        if shared := job[2]:
            with open(shared, "r+b") as pixels:
                _put(pictures, pixels)
        out.write(answer)
        _put(pictures, out)
        out.flush()


if __name__ == "__main__":
    main()
