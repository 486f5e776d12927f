"""Messages between the front end and the engine process: unchanged after decoding, and refused if malformed."""

from __future__ import annotations

import queue
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.engine.process import Link
from vllm_omni.engine.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    Abort,
    Add,
    Outputs,
    Refused,
    decode_command,
    decode_event,
    encode,
)
from vllm_omni.errors import InvalidValueError, OmniError, QueueFullError
from vllm_omni.outputs import OmniRequestOutput


def test_an_oversized_frame_is_skipped_and_the_next_one_read() -> None:
    ours, theirs = socket.socketpair()
    ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
    link = Link(theirs, lambda: ended.put(True))
    ours.sendall(HEADER.pack(MAX_FRAME_BYTES + 1))
    block, left = bytes(2**24), MAX_FRAME_BYTES + 1
    while left:
        left -= ours.send(block[: min(left, len(block))])
    ours.sendall(encode(Abort(["mine"])))
    assert link.commands.get(timeout=20) == Abort(["mine"])
    ours.close()
    assert ended.get(timeout=5)
    theirs.close()


def test_a_request_that_cannot_be_read_is_refused_and_the_next_frame_read() -> None:
    """Whoever sent it waits for an answer."""
    ours, theirs = socket.socketpair()
    link = Link(theirs, lambda: None)
    good = encode(Add("lost", {"embeds": np.zeros((4, 4), np.float32)}, {}, 0, 1.0, None))
    ours.sendall(good.replace(b"\x92\x04\x04", b"\x92\x7f\x04"))
    ours.sendall(encode(Abort(["mine"])))
    assert link.commands.get(timeout=5) == Abort(["mine"])
    with ours.makefile("rb") as stream:
        (length,) = HEADER.unpack(stream.read(HEADER.size))
        refused = decode_event(stream.read(length))
    assert isinstance(refused, Refused) and refused.request_id == "lost"
    assert isinstance(refused.error, InvalidValueError)
    ours.close()
    theirs.close()


def test_messages_are_the_same_after_encode_and_decode() -> None:
    picture = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    tensor = torch.randn(2, 3).bfloat16()
    add = decode_command(encode(Add("a", {"image": picture, "embeds": tensor}, {"seed": 2**64 - 1}, 0, 1.0, None))[4:])
    assert isinstance(add, Add) and add.params == {"seed": 2**64 - 1}
    assert np.array_equal(np.asarray(add.prompt["image"]), np.asarray(picture))
    assert torch.equal(add.prompt["embeds"], tensor) and add.prompt["embeds"].dtype == torch.bfloat16
    output = OmniRequestOutput(
        "a", error=QueueFullError(3, 7.5), latents=np.eye(2, dtype=np.float32), plan=(True, False)
    )
    (back,) = decode_event(encode(Outputs([output]))[4:]).outputs
    assert (
        type(back.error) is QueueFullError and back.error.retry_after_s == 7.5 and str(back.error) == str(output.error)
    )
    assert back.plan == (True, False) and np.array_equal(back.latents, np.eye(2))


def test_a_picture_or_array_of_a_wrong_size_is_refused() -> None:
    good = encode(Add("a", Image.new("RGB", (4, 4)), {}, 0, 1.0, None))[4:]
    wide = good.replace(b"\x92\x04\x04", b"\x92\x7f\x04")
    assert wide != good
    for body in (wide, good.replace(b"\xa3RGB", b"\xa3XYZ"), good[:-5]):
        with pytest.raises(ValueError):
            decode_command(body)
    array = encode(Add("a", np.zeros((4, 4), np.float32), {}, 0, 1.0, None))[4:]
    for body in (array.replace(b"\x92\x04\x04", b"\x92\xff\x04"), array.replace(b"float32", b"float99")):
        with pytest.raises(ValueError):
            decode_command(body)


def test_errors_of_unknown_classes_lose_their_text() -> None:
    output = OmniRequestOutput("a", error=RuntimeError("at 0x7f00dead in /srv/secret.py"))
    (back,) = decode_event(encode(Outputs([output]))[4:]).outputs
    assert type(back.error) is OmniError and "RuntimeError" in str(back.error) and "secret" not in str(back.error)
