"""Large pictures on their way to the engine: in memory that both processes see, fetched beside the steps."""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vllm_omni.engine.pictures import SharedMemory, SharedPicture, resized_ahead
from vllm_omni.engine.process import Link
from vllm_omni.engine.wire import Abort, Add, Control, Refused, Sleep, decode_command, decode_event, encode
from vllm_omni.errors import InvalidValueError

SIZE = (640, 480)


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)).convert(mode)


def shared(*pictures: Image.Image) -> list[SharedPicture]:
    """All in one memory, one after the other."""
    memory, made, after = SharedMemory(), [], 0
    for picture in pictures:
        os.pwrite(memory.descriptor, picture.tobytes(), after)
        made.append(SharedPicture(picture.mode, picture.size, memory, after))
        after = made[-1].after
    return made


def add(request_id: str, media: dict[str, Any]) -> bytearray:
    prompt = {"prompt": "x", "multi_modal_data": media}
    return encode(Add(request_id, prompt, {"width": 64, "height": 48}, 0, 0.0, None))


@pytest.fixture
def link() -> Iterator[tuple[Link, socket.socket]]:
    """The engine's end, and the socket of the front end."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(10)
        yield Link(theirs, lambda: None), ours
    theirs.close()


def test_a_picture_crosses_by_its_place_and_costs_no_descriptor() -> None:
    picture, mask = noise(), noise("L")
    before = len(os.listdir("/proc/self/fd"))
    one, two = shared(picture, mask)
    frame = add("a", {"image": one, "mask": two})
    assert len(frame) < 1000
    place = decode_command(frame[4:]).prompt["multi_modal_data"]["mask"]  # type: ignore[union-attr]
    assert np.array_equal(place.image(), mask) and np.array_equal(one.image(), picture)
    del one, two
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="picture"):
        place.image()
    other = SharedMemory()  # may have the same number
    assert other.inode != place.inode
    with pytest.raises(ValueError, match="picture"):
        place._replace(descriptor=other.descriptor, pid=os.getpid()).image()


@pytest.mark.parametrize("change", [{"size": (10**6, 10**6)}, {"size": (0, 5)}, {"mode": "P"}, {"offset": -1},
                                    {"offset": 10**9}, {"pid": 2**30}, {"size": (SIZE[0], SIZE[1] + 1)}])  # fmt: skip
def test_a_place_that_lies_is_refused(change: dict[str, Any]) -> None:
    (one,) = shared(noise())
    with pytest.raises(ValueError):
        one.place._replace(**change).image()


def test_the_engine_gets_the_picture_and_then_what_is_about_its_request(link: tuple[Link, socket.socket]) -> None:
    engine, front_end = link
    picture, mask = noise(), noise("L")
    one, two = shared(picture, mask)
    front_end.sendall(add("a", {"image": [one, one], "mask": two}) + encode(Control("0", Sleep())))
    first, second = engine.commands.get(timeout=10), engine.commands.get(timeout=10)
    assert isinstance(first, Add) and isinstance(second, Control)
    media = first.prompt["multi_modal_data"]
    assert all(np.array_equal(got, picture) for got in media["image"]) and np.array_equal(media["mask"], mask)
    front_end.sendall(add("b", {"image": one}) + encode(Abort(["b"])))
    kinds = [type(engine.commands.get(timeout=10)).__name__]
    while kinds[-1] != "Abort" or "Add" not in kinds:  # it may also come before the request, and then has no effect
        kinds.append(type(engine.commands.get(timeout=10)).__name__)
    assert kinds in (["Add", "Abort"], ["Abort", "Add", "Abort"], ["Add", "Abort", "Abort"])


def test_a_picture_that_is_gone_costs_its_request_alone(link: tuple[Link, socket.socket]) -> None:
    engine, front_end = link
    (one,) = shared(noise())
    frame = add("a", {"image": one})
    del one
    front_end.sendall(frame + add("b", {"image": noise()}))
    with front_end.makefile("rb") as events:
        length = int.from_bytes(events.read(4), "big")
        refused = decode_event(events.read(length))
    assert isinstance(refused, Refused) and refused.request_id == "a"
    assert not isinstance(refused.error, InvalidValueError) and "ask again" in str(refused.error)  # no fault of its own
    following = engine.commands.get(timeout=10)
    assert isinstance(following, Add) and following.request_id == "b"
    with pytest.raises(queue.Empty):
        engine.commands.get(timeout=0.1)


@pytest.mark.parametrize("again", ["pictures", "none"])
def test_an_id_that_is_used_again_while_its_pictures_are_fetched_comes_in_order(
    link: tuple[Link, socket.socket], again: str
) -> None:
    engine, front_end = link
    (one,) = shared(noise())
    with engine._lock:  # nothing is fetched meanwhile
        front_end.sendall(b"".join(add("first", {"image": one}) for _ in range(20)))  # keep the fetching thread busy
        front_end.sendall(add("a", {"image": one}) + encode(Abort(["a"])) + encode(Control("0", Sleep())))
        front_end.sendall(add("a", {"image": one} if again == "pictures" else {}) + add("last", {"image": one}))
    seen: list[Any] = [engine.commands.get(timeout=10)]
    while not (isinstance(seen[-1], Add) and seen[-1].request_id == "last"):
        seen.append(engine.commands.get(timeout=10))
    added = [one.request_id for one in seen if isinstance(one, Add)]
    assert added == ["first"] * 20 + ["a", "a", "last"], "also after the same id twice"
    about = [type(one).__name__ for one in seen if not (isinstance(one, Add) and one.request_id != "a")]
    about = about[about.index("Add") :]
    assert about == ["Add", "Abort", "Control", "Add"]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_is_resized_ahead_is_what_would_have_been_resized(mode: str) -> None:
    picture, lanczos = noise(mode), Image.Resampling.LANCZOS
    ahead = resized_ahead(noise(mode), (64, 48))
    for arguments in (((64, 48), lanczos), ((64, 48), Image.Resampling.NEAREST), ((64, 47), lanczos), ((64, 48),),
                      ((64, 48), lanczos, (0, 0, 99, 99)), ((64, 48), lanczos, None, 2.0)):  # fmt: skip
        assert np.array_equal(ahead.resize(*arguments), picture.resize(*arguments)), arguments
    ready = ahead.resize((64, 48), resample=lanczos, reducing_gap=None)
    ready.paste(0, (0, 0, 64, 48))
    assert np.array_equal(ahead.resize((64, 48), lanczos), picture.resize((64, 48), lanczos)), "a copy each time"
    assert np.array_equal(ahead.copy(), picture) and isinstance(ahead, Image.Image)
