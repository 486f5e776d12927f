"""Pictures and videos as files: PNG, JPEG, WebP; MP4, GIF, animated WebP. Pillow and imageio do the work.

Knows no engine. A video is a list of PIL frames of one size; `fps` is in frames per second.
"""

from __future__ import annotations

import io
import math
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import MAX_FPS
from vllm_omni.outputs.sound import encode_sound, ffmpeg_for

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
VIDEO_FORMATS = ("mp4", "gif", "webp")
MAX_INPUT_PIXELS = 64 * 2**20
MAX_SCANS = 100  # of a JPEG: each is a walk over all its blocks, however few bytes it has
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
# What Pillow raises on bytes that are no picture.
_UNREADABLE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, TypeError,
    IndexError, KeyError, struct.error, zlib.error, MemoryError,
)  # fmt: skip


def open_image(source: Path | bytes, field: str = "image", max_pixels: int = MAX_INPUT_PIXELS) -> Image.Image:
    """An RGB picture from a file or its bytes, turned as its EXIF says; a transparent one lies on white.

    InvalidValueError for what is no PNG, JPEG or WebP, is cut off, or has more than `max_pixels`; the size is looked at
    before any pixel is decoded.
    """
    picture = _open(source, field, max_pixels)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def open_mask(source: Path | bytes, field: str = "mask", max_pixels: int = MAX_INPUT_PIXELS) -> Image.Image:
    """A mask in shades of gray: white where its picture is to be repainted, which is also where it is transparent."""
    picture = _open(source, field, max_pixels)
    if not picture.has_transparency_data:
        return picture.convert("L")
    return ImageOps.invert(picture.convert("RGBA").getchannel("A"))


def announced(data: bytes, field: str) -> tuple[int, int]:
    """(pixels, what decoding costs in pixels) as the header says; InvalidValueError for no picture or too many scans."""
    with _readable(data, field), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
        scans = data.count(_SCAN) if data.startswith(_JPEG) else 1  # one of several pictures has a format of its own
        pixels = picture.width * picture.height
        if scans > MAX_SCANS:
            raise InvalidValueError(field, f"{scans} scans", f"must have at most {MAX_SCANS}, as a JPEG")
        return pixels, pixels * (1 + scans // 10)


def _open(source: Path | bytes, field: str, max_pixels: int) -> Image.Image:
    with _readable(source, field):
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
        if picture.width * picture.height > max_pixels:
            size = f"{picture.width}x{picture.height}"
            raise InvalidValueError(field, size, f"must have at most {max_pixels} pixels")
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        upright.load()
        return upright


@contextmanager
def _readable(source: Path | bytes, field: str) -> Iterator[None]:
    """InvalidValueError for whatever Pillow raises."""
    shown = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        yield
    except FileNotFoundError:
        raise InvalidValueError(field, shown, "must be a file that exists") from None
    except _UNREADABLE as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(field, shown, "must be a whole PNG, JPEG or WebP picture") from None


def encode_png(picture: Image.Image) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_video(
    frames: Sequence[Image.Image], format: str, fps: float, sound: Any = None, rate: int | None = None
) -> bytes:
    """The file's bytes; `format` is one of VIDEO_FORMATS. MP4 is H.264, 4:2:0, which every player takes.

    `sound`, a waveform of `rate` samples per second, becomes an MP4's AAC track; the other formats have none.
    """
    if format not in VIDEO_FORMATS:
        raise InvalidValueError("format", format, f"must be one of: {', '.join(VIDEO_FORMATS)}")
    if not frames:
        raise InvalidValueError("frames", 0, "must be at least one picture")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 1 <= fps <= 2 * MAX_FPS:
        raise InvalidValueError("fps", fps, f"must be a number from 1 to {2 * MAX_FPS}, of frames per second")
    if format == "mp4":
        return _mp4(frames, fps, None if sound is None or not rate else encode_sound(sound, "wav", rate))
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if format == "webp" else {"optimize": False}
    options |= {"duration": _durations(len(frames), fps, *((1, 1) if format == "webp" else (10, 20)))}
    frames[0].save(buffer, format, save_all=True, append_images=list(frames[1:]), loop=0, **options)
    return buffer.getvalue()


def _durations(count: int, fps: float, unit: int, least: int) -> list[int]:
    """Of each frame, in ms: multiples of `unit` whose sum is never further off than one; players want the `least`."""
    ends = [unit * round(1000 * i / fps / unit) for i in range(count + 1)]
    return [max(least, end - begin) for begin, end in pairwise(ends)]


def contact_sheet(frames: Sequence[Image.Image], most: int = 25, side: int = 256) -> Image.Image:
    """Up to `most` frames at equal distances, row by row on one picture, each at most `side` pixels wide and high."""
    count = min(most, len(frames))
    shown = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    scale = min(1.0, side / max(shown[0].size))
    width, height = (max(1, round(length * scale)) for length in shown[0].size)
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for i, frame in enumerate(shown):
        sheet.paste(frame.convert("RGB").resize((width, height)), (i % columns * width, i // columns * height))
    return sheet


def save_video(
    frames: Sequence[Image.Image], path: Path | str, fps: float, sound: Any = None, rate: int | None = None
) -> None:
    """Write `path`; its suffix is the format."""
    path = Path(path)
    path.write_bytes(encode_video(frames, path.suffix.removeprefix(".").lower(), fps, sound, rate))


def _mp4(frames: Sequence[Image.Image], fps: float, wav: bytes | None) -> bytes:
    ffmpeg_for("mp4")  # imageio would look for it only later, and say less
    import imageio.v2 as imageio

    with tempfile.TemporaryDirectory(prefix="vllm-omni-") as folder:  # an MP4's index is written by seeking back
        path = Path(folder) / "video.mp4"
        # 4:2:0 needs even sides; faststart puts the index first, so that a browser plays while it loads.
        options: Any = {"codec": "libx264", "quality": 9, "macro_block_size": 2}
        options["ffmpeg_params"] = ["-movflags", "+faststart"]
        if wav is not None:
            (Path(folder) / "sound.wav").write_bytes(wav)
            options |= {"audio_path": str(Path(folder) / "sound.wav"), "audio_codec": "aac"}
        imageio.mimwrite(path, [np.asarray(frame.convert("RGB")) for frame in frames], fps=fps, **options)
        return path.read_bytes()
