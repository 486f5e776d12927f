"""Embeddings of prompts, kept for whoever asks for the same once more. Knows no pipeline and no request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy
import torch
from PIL import Image

from vllm_omni.inputs.data import own


class PromptCache:
    """At most `max_bytes` of what an encoder returned, the least recently used going first; 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def encode(self, owner: Hashable, encode: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any]) -> Any:
        """What `encode` returns for these arguments, bit for bit, in memory of the caller's own.

        It is computed once for each `owner`; always, if there is no text, or an argument that cannot be compared.
        """
        text = given.get("prompt", args[0] if args else None)
        key = _key(owner, args, given) if self._max_bytes and isinstance(text, str | list) else None
        if key is None:
            return encode(*args, **given)
        if (found := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            self.hits += 1
            return own(found[0])
        self.misses += 1
        result = encode(*args, **given)
        self._keep(key, result)
        return result

    def clear(self) -> None:
        """Forget all: what made them has changed."""
        self._entries.clear()
        self.bytes = 0

    def _keep(self, key: bytes, result: Any) -> None:
        try:
            size = _bytes_of(result)
        except TypeError:
            return
        if size > self._max_bytes or key in self._entries:  # another request was as quick
            return
        self._entries[key] = own(result), size
        self.bytes += size
        while self.bytes > self._max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1][1]


def _key(owner: Hashable, args: Sequence[Any], given: Mapping[str, Any]) -> bytes | None:
    """Equal for equal arguments alone, pictures and tensors included; None if one of them cannot be compared."""
    digest = blake2b(digest_size=32)
    try:
        for part in (repr(owner), tuple(args), dict(given)):
            _feed(digest, part)
    except TypeError:
        return None
    return digest.digest()


def _feed(digest: blake2b, value: Any) -> None:
    """Add a value with its type and length, so that no two values read alike."""
    data = b""
    if isinstance(value, torch.Tensor):
        head: Any = value.dtype, tuple(value.shape)
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, numpy.ndarray) and value.dtype != object:
        head, data = (value.dtype, value.shape), value.tobytes()
    elif isinstance(value, Image.Image):
        head = value.mode, value.size, value.getpalette("RGBA") if value.mode in ("P", "PA") else None, _keyed(value)
        data = value.tobytes()
    elif isinstance(value, list | tuple):
        head = len(value)
    elif isinstance(value, dict):
        head = list(value)
    elif value is None or isinstance(value, str | int | float | torch.dtype | torch.device):
        head = value
    else:
        raise TypeError(type(value))
    text = f"{type(value).__name__} {head!r}".encode(errors="surrogatepass")
    digest.update(b"%d %d " % (len(text), len(data)) + text + data)
    for entry in value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ():
        _feed(digest, entry)


def _keyed(picture: Image.Image) -> object:
    """The colour that a picture's file declares to be transparent."""
    return picture.info.get("transparency")


def _bytes_of(value: Any) -> int:
    """Of all tensors in what an encoder returned; TypeError for anything that cannot be copied."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if type(value) in (list, tuple, dict):
        return sum(map(_bytes_of, value.values() if isinstance(value, dict) else value))
    if value is None or isinstance(value, str | int | float):
        return 0
    raise TypeError(type(value))
