"""Pictures as bytes: out with the parameters that made them, in without trusting a name, a type or a header."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from vllm_omni.entrypoints.openai.errors import invalid
from vllm_omni.entrypoints.openai.fetch import fetch
from vllm_omni.entrypoints.serve_config import ServeConfig

FORMATS = ("PNG", "JPEG", "WEBP")


def encode(image: Image.Image, kind: str, compression: int | None, parameters: dict[str, Any] | None) -> str:
    """base64 of a PNG, JPEG or WebP; `parameters` go into the PNG's text chunk as other tools read and write it."""
    buffer = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        if parameters:
            info.add_itxt("parameters", _as_text(parameters))
            info.add_itxt("vllm_omni", json.dumps(parameters, ensure_ascii=False))
        image.save(buffer, "PNG", pnginfo=info, compress_level=3)
    else:
        quality = 100 if compression is None else max(1, compression)
        image.convert("RGB").save(buffer, kind.upper(), quality=quality)
    return base64.b64encode(buffer.getvalue()).decode()


def _as_text(parameters: dict[str, Any]) -> str:
    """`prompt`, `Negative prompt: …`, `Steps: …, Seed: …`: the lines that many tools understand."""
    named = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size",
             "Model": "model"}  # fmt: skip
    facts = ", ".join(f"{label}: {parameters[key]}" for label, key in named.items() if parameters.get(key) is not None)
    negative = parameters.get("negative_prompt")
    return "\n".join([parameters["prompt"], *([f"Negative prompt: {negative}"] if negative else []), facts])


def decode(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """An upright RGB picture; a 400 that names the field for everything else. Its size is read before its pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < 2 or width * height > max_pixels:
                raise invalid(field, f"a picture must have 2x2 to {max_pixels} pixels", "invalid_image")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError,
            struct.error, zlib.error, Image.DecompressionBombError, MemoryError):  # fmt: skip
        raise invalid(field, "must be a whole PNG, JPEG or WebP picture", "invalid_image") from None


def decode_url(url: Any, field: str, config: ServeConfig) -> Image.Image:
    """The picture of a `data:` URL, or behind an address where the operator allows its host; may block on that."""
    limit = config.max_input_pixels
    if isinstance(url, str) and url.startswith("data:"):
        return _decode_data_url(url, field, limit)
    if not isinstance(url, str) or not config.allowed_media_domains:
        raise invalid(field, "must be a data: URL; this server opens no addresses", "invalid_image")
    return decode(fetch(url, field, config.allowed_media_domains, int(config.max_body_mb * 2**20)), field, limit)


def _decode_data_url(url: str, field: str, max_pixels: int) -> Image.Image:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise invalid(field, "must be a data: URL in base64", "invalid_image")
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError:
        raise invalid(field, "must be a data: URL in base64", "invalid_image") from None
    return decode(data, field, max_pixels)
