"""Pictures as bytes: out with the parameters that made them, in without trusting a name, a type or a header.

An address is opened only if the operator allows its host, and no reply and no name server can send us elsewhere: a name
is resolved once, every address it has must be public, and the connection goes to one of those addresses, with TLS for
the name. Redirects are not followed; no proxy and no cookie is used. Knows no route and no engine.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import ipaddress
import json
import re
import socket
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

from PIL import Image, PngImagePlugin

from vllm_omni.engine.pictures import Sent
from vllm_omni.engine.wire import MAX_FRAME_BYTES
from vllm_omni.entrypoints.openai.decoding import Decoder, Given, Refusal
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.serve_config import ServeConfig

PORT = 443
_FETCHERS = ThreadPoolExecutor(16, "vllm-omni-fetch")  # of their own: a slow host delays no decoding and no encoding
_PART = 2**20  # characters of base64 that are decoded at a time; whole groups of four
SECONDS = 10.0  # for one picture, from resolving its host to its last byte
_URL = re.compile(r"https://([a-z0-9.-]{1,253})(?::443)?(/[!$&-;=?-Z_a-z~%]{0,2000})", re.ASCII)
_IPV6_INTERNET = ipaddress.ip_network("2000::/3")
_TUNNELS = tuple(map(ipaddress.ip_network, ("2001::/32", "2002::/16")))  # Teredo, 6to4: an IPv4 address inside


def encode(image: Image.Image, kind: str, compression: int | None, parameters: dict[str, Any] | None) -> str:
    """base64 of a PNG, JPEG or WebP; `parameters` go into the PNG's text chunk as other tools read and write it."""
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        if parameters:
            info.add_itxt("parameters", _as_text(parameters))
            info.add_itxt("vllm_omni", json.dumps(parameters, ensure_ascii=False))
        data = to_bytes(image, "PNG", pnginfo=info)
    else:
        data = to_bytes(image.convert("RGB"), kind.upper(), quality=100 if compression is None else max(1, compression))
    return base64.b64encode(data).decode()


def to_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file. A PNG is packed quickly rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **{"compress_level": 3} | options)
    return buffer.getvalue()


def _as_text(parameters: dict[str, Any]) -> str:
    """`prompt`, `Negative prompt: …`, `Steps: …, Seed: …`: the lines that many tools understand."""
    named = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size",
             "Model": "model"}  # fmt: skip
    facts = ", ".join(f"{label}: {parameters[key]}" for label, key in named.items() if parameters.get(key) is not None)
    negative = parameters.get("negative_prompt")
    return "\n".join([parameters["prompt"], *([f"Negative prompt: {negative}"] if negative else []), facts])


async def load(
    sources: dict[str, list[tuple[str, Any]]], config: ServeConfig, decoder: Decoder, copies: int = 1
) -> dict[str, tuple[Sent, ...]]:
    """The pictures of (the client's name, bytes or URL), by the pipeline's argument: upright RGB pictures.

    A mask is white where the picture is to be repainted: in shades of gray, or where it is transparent. ApiError 400
    that names the field for everything else. `copies`: how many requests carry them to the engine.
    """
    limits, names = config.limits, [name for found in sources.values() for name, _ in found]
    if len(names) > limits.max_input_images:
        raise invalid(names[0], f"at most {limits.max_input_images} pictures are taken")
    if not names:
        return {}
    given, room = [], limits.max_body_bytes
    for argument, found in sources.items():
        for name, source in found:
            data = await _read(source, name, config, room)
            given.append(Given(name, "mask" in argument, data))
            room -= len(data)
    crossing = MAX_FRAME_BYTES // 3 // min(copies, limits.max_n)
    decoded = await decoder.decode(given, min(limits.max_input_pixels, crossing))
    if isinstance(decoded, Refusal):
        raise invalid(decoded.field, decoded.text, "invalid_image")
    rest = iter(decoded)
    pictures = {argument: tuple(islice(rest, len(found))) for argument, found in sources.items()}
    for argument, found in sources.items():
        size, own = next(iter(pictures.values()))[0].size, pictures[argument][0].size
        if "mask" in argument and own != size:
            raise invalid(found[0][0], f"the mask must have the size of the picture, {size[0]}x{size[1]}")
    return pictures


async def _read(source: Any, field: str, config: ServeConfig, max_bytes: int) -> bytes:
    """What was sent, or is in a `data:` URL, or behind an address if the operator allows its host."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str) or not (source.startswith("data:") or config.allowed_media_domains):
        raise invalid(field, "must be a data: URL; this server opens no addresses", "invalid_image")
    if not source.startswith("data:"):
        hosts, loop = config.allowed_media_domains, asyncio.get_running_loop()
        return await loop.run_in_executor(_FETCHERS, fetch, source, field, hosts, max_bytes)
    head, _, body = source.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return await _from_base64(body)
    except ValueError:
        raise invalid(field, "must be a data: URL in base64", "invalid_image") from None


async def _from_base64(text: str) -> bytes:
    """The bytes, a part in each turn of the loop, which it holds up; ValueError for other text."""
    parts = []
    for start in range(0, len(text), _PART):
        part = text[start : start + _PART]
        if len(text) > start + _PART and part.endswith("="):
            raise ValueError
        parts.append(base64.b64decode(part, validate=True))
        await asyncio.sleep(0)
    return b"".join(parts)


def fetch(url: str, field: str, hosts: Sequence[str], max_bytes: int) -> bytes:
    """The body behind an https address of one of `hosts`; ApiError 400 that names `field` for anything else.

    Blocks for at most `SECONDS` and a name server's own time-out; to be called off the event loop.
    """
    if not (match := _URL.fullmatch(url)):
        raise _refused(field, "must be a data: URL, or https://HOST/PATH without port, user or fragment")
    host, path = match[1], match[2]
    if host not in hosts:
        raise _refused(field, "names a host that this server does not fetch from")
    address = resolve(host, field)
    try:
        return _get(host, address, path, field, max_bytes)
    except (OSError, http.client.HTTPException):
        raise _refused(field, "could not be fetched") from None


def resolve(host: str, field: str) -> str:
    """One of the host's addresses; ApiError unless all of them are public."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise _refused(field, "names a host that cannot be found") from None
    if not found or not all(map(is_public, found)):
        raise _refused(field, "names a host without a public address")
    return min(found)


def is_public(address: str) -> bool:
    """True for an address of the Internet: not loopback, private, link-local, shared, multicast or a tunnel's."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a zone: link-local
        return False
    if parsed.version == 6 and (parsed not in _IPV6_INTERNET or any(parsed in tunnel for tunnel in _TUNNELS)):
        return False
    return parsed.is_global and not parsed.is_multicast


def _get(host: str, address: str, path: str, field: str, max_bytes: int) -> bytes:
    plain = socket.create_connection((address, PORT), timeout=SECONDS)
    secure = ssl.create_default_context().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    late = threading.Event()
    timer = threading.Timer(SECONDS, _hang_up, (secure, late))  # a byte now and then must not hold a thread for ever
    timer.start()
    try:
        secure.do_handshake()
        connection = http.client.HTTPConnection(host, timeout=SECONDS)
        connection.auto_open, connection.sock = 0, secure
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise _refused(field, f"was answered with {reply.status}; redirects are not followed")
        data = reply.read(max_bytes + 1)
        if late.is_set():  # what came until then may look whole
            raise _refused(field, f"took longer than {SECONDS:g} s")
    finally:
        timer.cancel()
        secure.close()
    if len(data) > max_bytes or reply.length:  # `length`: what is missing of the announced body
        raise _refused(field, f"must be a whole picture of at most {max_bytes} bytes")
    return data


def _hang_up(secure: ssl.SSLSocket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it has ended
        socket.socket.shutdown(secure, socket.SHUT_RDWR)  # the TCP connection's: TLS would say goodbye first


def _refused(field: str, message: str) -> ApiError:
    return invalid(field, message, "invalid_image")
