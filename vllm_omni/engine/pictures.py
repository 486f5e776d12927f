"""Pictures on their way to the engine: raw pixels in the frame that is sent, or in memory that both processes see.

A large one that crossed in a frame would hold up the front end's loop while it is copied, and every frame behind it.
Knows no message.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

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


class SharedMemory:
    """Memory without a name, which lasts as long as this object; processes of the same user open it at `path`. Linux.

    Raises OSError when no descriptor is free.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("vllm-omni-pictures")
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        self.inode = os.fstat(self.descriptor).st_ino

    def __del__(self) -> None:
        os.close(self.descriptor)


class SharedPicture:
    """A picture whose pixels lie in shared memory at `offset`."""

    def __init__(self, mode: str, size: tuple[int, int], memory: SharedMemory, offset: int) -> None:
        self.mode, self.size, (self.width, self.height) = mode, size, size
        self._memory, self._offset = memory, offset
        self.after = offset + self.width * self.height * CHANNELS[mode]

    @property
    def place(self) -> tuple[str, tuple[int, int], int, int, int, int]:
        """What `shared_image` takes, in any process."""
        return self.mode, self.size, os.getpid(), self._memory.descriptor, self._memory.inode, self._offset

    def image(self) -> Any:
        """The same as Pillow has it."""
        return shared_image(*self.place)


def shared_image(mode: str, size: tuple[int, int], pid: int, descriptor: int, inode: int, offset: int) -> Any:
    """The picture in the memory that process `pid` has open; ValueError if it is there no more, or is too short."""
    from PIL import Image

    length = size[0] * size[1] * CHANNELS.get(mode, 0)
    if min(size) < 1 or length < 1 or offset < 0:
        raise ValueError(f"no picture is {mode} {size}")
    try:
        own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.fstat(own).st_ino != inode:  # the number is another file's by now
                raise ValueError("the picture is there no more")
            with mmap.mmap(own, offset + length, prot=mmap.PROT_READ) as memory, memoryview(memory)[offset:] as pixels:
                return Image.frombytes(mode, size, pixels)  # in C, without the interpreter's lock
        finally:
            os.close(own)
    except OSError as error:
        raise ValueError(f"the picture cannot be read ({error.strerror})") from None


Sent = PackedPicture | SharedPicture
