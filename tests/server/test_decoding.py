"""The decoders of strangers' pictures by themselves: lanes, shared memory, and that nothing reaches the log."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import struct
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hostile import chunk, raw_png, saved, scene
from PIL import Image

from vllm_omni.engine.pictures import PackedPicture, SharedPicture
from vllm_omni.entrypoints.openai.decoding import SMALL_BYTES, WAITING, Decoder, Given, Refusal
from vllm_omni.entrypoints.openai.protocol.errors import ApiError

MOST = 32 * 2**20


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(MOST)
    yield made
    made.close()


def given(data: bytes, mask: bool = False) -> list[Given]:
    return [Given("image", mask, data)]


@pytest.mark.slow
async def test_a_picture_of_countless_parts_keeps_no_small_one_waiting(decoder: Decoder) -> None:
    """Its header says 64 by 64 pixels; reading it takes a second or more."""
    gray = saved(Image.new("L", (64, 64)), "JPEG")
    parts = [raw_png(64, 64, bytes(64 * 193), more=chunk(b"prVt", b"") * 400_000),
             gray[:2] + b"\xff\xfe\0\2" * 2**20 + gray[2:]]  # fmt: skip
    slow = [asyncio.create_task(decoder.decode(given(data), MOST)) for data in parts]
    await asyncio.sleep(0)  # they have been sent
    for _ in range(5):
        assert not isinstance(await decoder.decode(given(saved(scene())), MOST), Refusal)
    assert not all(task.done() for task in slow)
    for task in slow:
        assert not isinstance(await task, Refusal), "it takes longer, and is no fault"


async def test_pixels_of_large_pictures_are_shared(decoder: Decoder) -> None:
    y, x = np.mgrid[0:2048, 0:2100]
    large = Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8))
    got = await decoder.decode([*given(saved(large)), *given(saved(large), mask=True)], MOST)
    assert isinstance(got, list) and got[0].image().tobytes() == large.tobytes()
    assert got[1].image().tobytes() == large.convert("L").tobytes()
    small = await decoder.decode(given(saved(scene())), MOST)
    assert isinstance(small, list) and isinstance(small[0], PackedPicture)
    assert small[0].image().tobytes() == scene().tobytes()
    assert all(isinstance(one, SharedPicture) == (sys.platform == "linux") for one in got)


async def test_large_pictures_have_so_much_memory_together() -> None:
    decoder, held = Decoder(5 * 2**20), []
    data = given(saved(Image.new("RGB", (2200, 2200))))
    with pytest.raises(ApiError) as full:
        for _ in range(2 * WAITING):
            held.append(await decoder.decode(data, 5 * 2**20))
    assert full.value.status == 503 and full.value.headers and len(held) >= WAITING
    assert not isinstance(await decoder.decode(given(saved(scene())), MOST), Refusal), "small ones go on"
    del held[2:]
    assert isinstance(await decoder.decode(data, 5 * 2**20), list)
    decoder.close()


@pytest.mark.parametrize("size", [100_000, SMALL_BYTES + 1])
async def test_files_that_wait_have_so_much_memory_together(size: int) -> None:
    """In either lane; beyond it clients are asked to come again at once, and what has left makes room at once."""
    decoder, data = Decoder(2**17 if size < SMALL_BYTES else 4 * SMALL_BYTES), given(bytes(size))
    room, refused = decoder._lanes[size > SMALL_BYTES]._room // size, 5
    tasks = [asyncio.create_task(decoder.decode(data, MOST)) for _ in range(room + refused)]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert done == {*tasks[room:]} and {one.exception().status for one in done} == {503}
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert isinstance(await decoder.decode(data, MOST), Refusal), "it is no picture"
    decoder.close()


class Files(list[Given]):
    """A list that can be watched."""


async def test_files_of_a_client_that_has_left_are_forgotten_at_once(decoder: Decoder) -> None:
    """Also while those of another are being decoded, and keep it from its turn."""
    size = SMALL_BYTES + 1
    other = asyncio.create_task(decoder.decode(given(bytes(size)), MOST))
    files = Files(given(bytes(size)))
    held, waiting = weakref.ref(files), asyncio.create_task(decoder.decode(files, MOST))
    await asyncio.sleep(0)  # both have been sent
    waiting.cancel()
    await asyncio.wait([waiting])
    del files, waiting
    gc.collect()
    assert held() is None and not other.done()
    await other


async def test_without_a_free_descriptor_the_client_is_asked_to_come_again(decoder: Decoder) -> None:
    """It is no fault of the picture's, and the next one is decoded."""
    large = given(saved(Image.new("RGB", (2048, 2100))))
    first = await decoder.decode(large, MOST)  # its process has been started
    assert isinstance(first, list) and isinstance(first[0], SharedPicture)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        with pytest.raises(ApiError) as caught:
            await decoder.decode(large, MOST)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.status == 503
    assert not isinstance(await decoder.decode(large, MOST), Refusal)


async def test_decoders_write_nothing_into_the_log(capfd: pytest.CaptureFixture[str], decoder: Decoder) -> None:
    """A library's warning there would be no line of JSON, and might quote what is in the file."""
    lying = struct.pack("<HHII", 0x0112, 3, 2**31 - 1, 8)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + lying + struct.pack("<I", 8)
    for data in (saved(scene(), exif=exif), b"\x89PNG\r\n\x1a\n" + bytes(100)):
        await decoder.decode(given(data), MOST)
    assert capfd.readouterr() == ("", "")


async def test_a_decoder_that_dies_is_replaced(decoder: Decoder) -> None:
    for _ in range(3):
        for process in [*decoder._lanes[0]._processes]:
            process.kill()
            process.wait()
        assert not isinstance(await decoder.decode(given(saved(scene())), MOST), Refusal)
