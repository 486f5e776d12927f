"""What the ranks of a group tell each other, over a socket pair between rank 0 and each other one."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
from msgspec import Struct

from vllm_omni.engine.wire import HEADER, MAX_FRAME_BYTES, Abort, Add, Close, Control, decoder_of, encode

Size = Any  # nested tuples of plain values, by which `Pace` knows a request's size
Measured = tuple[float, int]  # seconds, and of how many
Paced = tuple[Size, Measured, Measured, Measured]  # computed and skipped steps, encoding and decoding


class Join(Struct, tag=True):
    """The first message to a rank: what to load, and who it is."""

    engine_args: dict[str, Any]
    rank: int
    rendezvous: str  # a file that all ranks can reach
    seed: int  # of numbers that no request's own generator draws
    log_json: bool = False
    bound: bool = False  # to the thread that starts it, which lasts as long as its process


class Meet(Struct, tag=True):
    """All have loaded the model: build the group."""

    found: dict[str, str] = {}  # what rank 0 knows of denoisers that nobody has described


class Turn(Struct, tag=True):
    """What is done before the next step, and what rank 0 will do in it."""

    number: int
    acts: list[Add | Abort | Control]
    held: bool  # nobody begins
    paced: list[Paced]  # what rank 0 has measured since the last turn
    digest: str


class Verdict(Struct, tag=True):
    """A forward has failed on all ranks alike."""


class Loaded(Struct, tag="RankLoaded"):
    """The model is in memory, or why it is not."""

    error: Exception | None = None


class Done(Struct, tag=True):
    """A turn's step is over."""

    number: int


class Failed(Struct, tag=True):
    """A forward has failed; what the error says of itself that all ranks would say."""

    what: str


class Beat(Struct, tag=True):
    """The process lives."""


ToRank = Join | Meet | Turn | Verdict | Close
FromRank = Loaded | Done | Failed | Beat
_TO_RANK, _FROM_RANK = decoder_of(ToRank), decoder_of(FromRank)


def send(end: socket.socket, message: Struct) -> None:
    end.sendall(encode(message))


def receive(end: socket.socket, to_rank: bool) -> Any:
    """The next message; None once the other side is gone. OSError or ValueError for what cannot be read."""
    head = _exactly(end, HEADER.size)
    if head is None:
        return None
    (length,) = HEADER.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    body = _exactly(end, length)
    try:
        return None if body is None else (_TO_RANK if to_rank else _FROM_RANK).decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None


def _exactly(end: socket.socket, length: int) -> bytearray | None:
    body = bytearray(length)
    view, filled = memoryview(body), 0
    while filled < length:
        if (count := end.recv_into(view[filled:])) == 0:
            return None
        filled += count
    return body
