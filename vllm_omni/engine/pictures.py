"""Pictures on their way to the engine: raw pixels in the frame that is sent, or in memory that both processes see.

A large one that crossed in a frame would hold up the front end's loop while it is copied, and every frame behind it.
Knows no message.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import msgspec

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


class PackedPicture:
    """A picture in a frame: its `pixels` are written into the buffer that is sent, so that nobody copies them."""

    def __init__(self, mode: str, size: tuple[int, int]) -> None:
        self.mode, self.size, (self.width, self.height) = mode, size, size
        length = self.width * self.height * CHANNELS[mode]
        head = msgspec.msgpack.encode((mode, size, b""))[:-2] + struct.pack("!BI", 0xC6, length)  # msgpack's bin 32
        self.packed = bytearray(len(head) + length)
        self.packed[: len(head)] = head
        self.pixels = memoryview(self.packed)[len(head) :]

    def image(self) -> Any:
        """The same as Pillow has it."""
        from PIL import Image

        return Image.frombytes(self.mode, self.size, self.pixels)


_MEMORIES: WeakSet[SharedMemory] = WeakSet()


def shared_bytes() -> int:
    """What this process's pictures take of shared memory."""
    return sum(os.fstat(memory.descriptor).st_size for memory in list(_MEMORIES))


class SharedMemory:
    """Memory without a name, which lasts as long as this object; processes of the same user open it at `path`. Linux.

    Raises OSError when no descriptor is free.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("vllm-omni-pictures")
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        self.inode = os.fstat(self.descriptor).st_ino
        finalize(self, os.close, self.descriptor)
        _MEMORIES.add(self)


class SharedPicture:
    """A picture whose pixels lie in shared memory at `offset`."""

    def __init__(self, mode: str, size: tuple[int, int], memory: SharedMemory, offset: int) -> None:
        self.mode, self.size, (self.width, self.height) = mode, size, size
        self._memory = memory  # it lasts as long as a picture in it
        self.place = Place(mode, size, os.getpid(), memory.descriptor, memory.inode, offset)
        self.after = offset + self.width * self.height * CHANNELS[mode]

    def image(self) -> Any:
        """The same as Pillow has it."""
        return self.place.image()


class Place(NamedTuple):
    """Where the pixels of a picture lie: in the memory that process `pid` has open as `descriptor`."""

    mode: str
    size: tuple[int, int]
    pid: int
    descriptor: int
    inode: int
    offset: int

    def image(self) -> Any:
        """The picture as Pillow has it, in any process of this user; ValueError if it is there no more."""
        from PIL import Image

        length = self.size[0] * self.size[1] * CHANNELS.get(self.mode, 0)
        if min(self.size) < 1 or length < 1 or self.offset < 0:
            raise ValueError(f"no picture is {self.mode} {self.size}")
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            own = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", flags)
            try:
                if os.fstat(own).st_ino != self.inode:  # the number is another file's by now
                    raise ValueError("the picture is there no more")
                with (
                    mmap.mmap(own, self.offset + length, prot=mmap.PROT_READ) as memory,
                    memoryview(memory)[self.offset :] as pixels,
                ):
                    return Image.frombytes(self.mode, self.size, pixels)  # in C, without the interpreter's lock
            finally:
                os.close(own)
        except OSError as error:
            raise ValueError(f"the picture cannot be read ({error.strerror})") from None


def places_in(prompt: Any) -> dict[str, Any]:
    """The pictures of a prompt, by their names, if some of them lie in shared memory."""
    media = prompt.get("multi_modal_data") if isinstance(prompt, dict) else None
    found = media if isinstance(media, dict) else {}
    return found if any(isinstance(one, Place) for value in found.values() for one in _several(value)) else {}


def fetch(prompt: Any, params: dict[str, Any]) -> None:
    """Put pictures into the prompt where their places are, made ready for the size of the result."""
    width, height = params.get("width"), params.get("height")
    size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    media = places_in(prompt)
    for name, value in media.items():
        found = [one.image() if isinstance(one, Place) else one for one in _several(value)]
        found = [resized_ahead(one, size) if size else one for one in found]
        media[name] = found if isinstance(value, list) else found[0]


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def resized_ahead(picture: Any, size: tuple[int, int]) -> Any:
    """The same picture; resized to `size` as the image processors of diffusers do it, the result is there already.

    To be called off the thread that runs the steps, which would stand still meanwhile.
    """
    from PIL import Image

    lanczos = Image.Resampling.LANCZOS
    ready = picture.resize(size, lanczos)

    class Ahead(Image.Image):
        def resize(self, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None) -> Image.Image:
            if (tuple(size), resample, box, reducing_gap) == (ready.size, lanczos, None, None):
                return ready.copy()
            return super().resize(size, resample, box, reducing_gap)

    picture.__class__ = Ahead
    return picture


Sent = PackedPicture | SharedPicture
