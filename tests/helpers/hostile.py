"""What hostile or careless clients send: numbers, names, bytes, pictures. No test of its own."""

from __future__ import annotations

import io
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

# What no error may tell: addresses of objects, paths, tracebacks, classes.
PRIVATE = re.compile(r"0x[0-9a-f]{6,}|/(home|usr|tmp|work|root|opt|etc)/|Traceback|<class|<.* object at|\.py\b")

# Field -> smallest, largest (None: the server has no fixed one), type.
NUMBERS: dict[str, tuple[float, float | None, type]] = {
    "n": (1, 10, int), "num_inference_steps": (1, 200, int), "steps": (1, 200, int), "seed": (0, 2**64 - 1, int),
    "output_compression": (0, 100, int), "partial_images": (0, 3, int), "priority": (-2, 2, int),
    "guidance_scale": (0, 100, float), "true_cfg_scale": (0, 100, float), "strength": (0, 1, float),
    "timeout_s": (1e-9, 600, float), "width": (8, None, int), "height": (8, None, int),
}  # fmt: skip
VIDEO_NUMBERS: dict[str, tuple[float, float | None, type]] = {
    name: limits for name, limits in NUMBERS.items()
    if name not in ("n", "output_compression", "partial_images", "strength")
} | {
    "num_inference_steps": (1, 400, int), "steps": (1, 400, int), "num_frames": (1, None, int), "fps": (1, 120, float),
    "guidance_scale_2": (0, 100, float),
}  # fmt: skip

REFUSAL = 5  # times a GET of the models: what refusing a value may cost

PATHS = ["../x", "..%2fx", "%2e%2e/x", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/etc/passwd", "a%00b", "....//x", "C:\\x",
         "..\\..\\x", "~root", "link/passwd", ".", "..", "%252e%252e%252f"]  # fmt: skip


def says_too_much(text: str) -> bool:
    """Whether an error tells what is private, but for the client's own words, which it may repeat."""
    for name in sorted({unquote(word) for word in PATHS} | {unquote(unquote(word)) for word in PATHS}, key=len)[::-1]:
        text = text.replace(name, "") if len(name) > 2 else text
    return PRIVATE.search(text) is not None


def wrong_numbers(name: str, numbers: dict[str, tuple[float, float | None, type]] = NUMBERS) -> list[str]:
    """JSON texts that are no value of the field: beyond its limits, not finite, of other types."""
    low, high, kind = numbers[name]
    beyond = [str(high + 1), str(2**64)] if high is not None else [str(2**63), str(10**30)]
    beyond.append(str(10**400))  # more than a float holds
    below = [str(low - 1), str(-(2**63)), "-1e400"]
    others = ["true", "false", '"1"', "[]", "[1]", "{}", "NaN", "Infinity", "-Infinity", "1e400", "1.5e300"]
    return [*below, *beyond, *others, *(["1.5"] if kind is int else [])]


def as_quick(ask: Callable[[], Any], as_this: Callable[[], Any], times: float, tries: int = 20) -> bool:
    """Whether `ask` takes at most so many times as long as `as_this`; the quickest of several turns of both counts.

    A bound in seconds would be one for this machine: what a refusal costs is told by what the server does otherwise.
    """
    best = [float("inf")] * 2
    for _ in range(tries):
        for i, call in enumerate((ask, as_this)):
            began = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - began)
        if best[0] <= times * best[1]:
            return True
    return False


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(mode: str = "RGB") -> Image.Image:
    """64 by 48 pixels, no two corners alike."""
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([x * 4, y * 5, 255 - x * 2], axis=-1).astype(np.uint8)).convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, data: bytes = b"", *, depth: int = 8, color: int = 2, more: bytes = b"") -> bytes:
    """A PNG as its header says, whatever the data is."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bad_pictures() -> dict[str, bytes]:
    """Each to be refused with a 400."""
    plain = saved(scene())
    huge = struct.pack(">HH", 65500, 65500)
    jpeg = bytearray(saved(scene(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = huge
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (200 * 2**20)))
    return {
        "bomb 30,000 x 30,000": saved(Image.new("1", (30_000, 30_000))), "JPEG of 65,500 x 65,500": bytes(jpeg),
        "PNG of 2^31 x 2^31": raw_png(2**31 - 1, 2**31 - 1), "text of 200 MiB": raw_png(8, 8, b"", more=text),
        "0 x 0": raw_png(0, 0), "1 x 1": saved(Image.new("RGB", (1, 1))), "cut": plain[:-40], "head alone": plain[:33],
        "empty": b"", "zeros": bytes(1000), "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "TIFF": saved(scene(), "TIFF"), "GIF": saved(scene("P"), "GIF"), "BMP": saved(scene(), "BMP"),
        "ICO": saved(scene(), "ICO"), "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "PDF": b"%PDF-1.7\n",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "HTML": b"<html><script>alert(1)</script>",
        "HTML, then a PNG": b"<html>" + plain,
    }  # fmt: skip


def good_pictures() -> dict[str, tuple[bytes, Image.Image]]:
    """What a picture is sent as, and the upright RGB picture that it is."""
    plain = scene()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil", "x")
    grey = (np.mgrid[0:48, 0:64][1] * 1040).astype(np.uint16)
    shown = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    deep = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(grey[..., None], 3, axis=2))
    cmyk = saved(scene("CMYK"), "JPEG", quality=95)
    frames = [scene(), Image.new("RGB", (64, 48), "red")]
    see_through, half = scene("RGBA"), scene("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(half.size))
    alpha = np.asarray(half.getchannel("A"), dtype=float)[..., None] / 255
    on_white = Image.fromarray((np.asarray(plain) * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    return {
        "PNG": (saved(plain), plain),
        "APNG": (saved(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100), plain),
        "CMYK JPEG": (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        "16 bits of grey": (saved(Image.fromarray(grey)), shown),
        "16 bits of RGB": (raw_png(64, 48, deep, depth=16), shown),
        "turned PNG": (saved(plain, exif=exif), plain.transpose(Image.Transpose.ROTATE_270)),
        "turned WebP": (saved(plain, "WEBP", lossless=True, exif=exif), plain.transpose(Image.Transpose.ROTATE_270)),
        "palette": (saved(plain.quantize(16)), plain.quantize(16).convert("RGB")),
        "RGBA": (saved(see_through), plain),
        "see-through": (saved(half), on_white),
        "PNG and ZIP": (saved(plain) + archive.getvalue(), plain),
        "PNG and HTML": (saved(plain) + b"<html><script>alert(1)</script>", plain),
    }  # fmt: skip


def deep(levels: int, inner: str = "1") -> str:
    return '{"a":' * levels + inner + "}" * levels


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


# Members of a JSON object that no request may have.
MEMBERS = [
    *(f'"{field}": {value}' for field in ("cache", "lora") for value in (
        deep(5), deep(900), nested(900), deep(50_000), '{"threshold": NaN}', '{"threshold": -1e400}',
        '{"threshold": 1e400}', '{"mag_ratios": [NaN]}', f'{{"max_skip_steps": {2**70}}}', '"\\ud800"',
        '{"\\udfff": 1}', '{"name": "\\ud800"}', '{"a": 1, "a": 2}', f'{{"a": [{"1," * 2000}1]}}', '[["a", 1e999]]',
    )),
    '"prompt": "a", "prompt": "b"', f'"prompt": {deep(900)}', f'"user": "{"x" * 5000}"', '"model": "\\ud800"',
    '"user": "\\udc00"', '"negative_prompt": "\\ud800"', '"size": "\\ud800"', f'"size": "{"9" * 5000}x1"',
    '"x\\ud800": 1', f'"{"k" * 100_000}": 1', f'"seed": {"9" * 4000}', f'"prompt": "{"x" * 1_000_000}"',
]  # fmt: skip


def progressive(side: int, scans: int) -> bytes:
    """A progressive JPEG of side x side pixels of grey that repeats one empty scan: each is a walk over all blocks."""

    def bits(text: str) -> bytes:
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")

    def segment(marker: int, data: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data

    blocks, runs, one_code = (side // 8) ** 2, "", bytes([1] + [0] * 15)
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00"
    head = b"\xff\xd8" + segment(0xDB, b"\x00" + b"\x01" * 64) + segment(0xC2, frame)
    head += segment(0xC4, b"\x00" + one_code + b"\x00") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    head += segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bits("0" * blocks)
    while blocks > 0:  # end-of-band runs of 2^14 blocks and more
        run = min(blocks, 2**15 - 1)
        more = max(0, run - 2**14)
        runs, blocks = runs + "0" + format(more, "014b"), blocks - 2**14 - more
    return head + (segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + bits(runs)) * scans + b"\xff\xd9"
