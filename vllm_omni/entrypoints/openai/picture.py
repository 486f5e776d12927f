"""Pictures as bytes: out with the parameters that made them, in without trusting a name, a type or a header."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image, PngImagePlugin

from vllm_omni.entrypoints.openai.errors import invalid
from vllm_omni.entrypoints.openai.fetch import fetch
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.outputs.media import open_image


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
        picture = open_image(data, field, max_pixels)
    except InvalidValueError as error:
        raise invalid(field, str(error), "invalid_image") from None
    if min(picture.size) < 2:
        raise invalid(field, "a picture must have at least 2x2 pixels", "invalid_image")
    return picture


def decode_url(url: Any, field: str, config: ServeConfig) -> Image.Image:
    """The picture of a `data:` URL, or behind an address where the operator allows its host; may block on that."""
    limits = config.limits
    if isinstance(url, str) and url.startswith("data:"):
        return _decode_data_url(url, field, limits.max_input_pixels)
    if not isinstance(url, str) or not config.allowed_media_domains:
        raise invalid(field, "must be a data: URL; this server opens no addresses", "invalid_image")
    found = fetch(url, field, config.allowed_media_domains, int(limits.max_body_mb * 2**20))
    return decode(found, field, limits.max_input_pixels)


def _decode_data_url(url: str, field: str, max_pixels: int) -> Image.Image:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise invalid(field, "must be a data: URL in base64", "invalid_image")
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError:
        raise invalid(field, "must be a data: URL in base64", "invalid_image") from None
    return decode(data, field, max_pixels)
