"""Which parked calls may be made as one, joining them, and splitting the result. Knows no cache and no policy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_omni.diffusion.denoiser.discover import names_of
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.rows import equal, joined, latents_of, row_shape, row_slices
from vllm_omni.diffusion.denoiser.specs import Text
from vllm_omni.diffusion.worker.coroutine import ComponentCall

# Input elements of a joint component call: the latents of one FLUX picture of 1024 by 1024. Decoding several small
# pictures at once must not need more memory than a large one does, and large ones fill the machine one by one.
MOST_JOINED = 2**18
WORTH_PADDING = 1.25  # the longest sequence of a forward over the shortest


class CallBinder:
    """For one denoiser: positional arguments by name, and which calls may share a forward."""

    def __init__(self, name: str, denoiser: Denoiser) -> None:
        self.name, self.denoiser = name, denoiser
        self._names = names_of(denoiser.module)
        self.pads = True  # shorter texts, with a mask

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def key(self, arguments: Mapping[str, Any], alone: Hashable, memory: dict[int, Any]) -> Hashable:
        """Equal keys fit together. A call of unknown roles, or an argument that cannot be compared, goes `alone`.

        `memory` is the request's own: a shared tensor is read once per request, not once per step.
        """
        spec = self.denoiser.roles_for(arguments)
        if spec is None:
            return self.name, alone
        rows = len(latents_of(arguments))
        texts = {text.name: text for text in spec.texts}
        masks = {text.mask for text in spec.texts}
        parts: list[Hashable] = [self.name, self.denoiser.kind_of(arguments)]
        try:
            for name, value in arguments.items():
                if name in masks and self.pads:
                    continue  # of texts that are padded to each other's length
                if name in texts and self.pads:
                    parts.append((name, _text_shape(texts[name], value, latents_of(arguments))))
                elif name in spec.rows:
                    parts.append((name, row_shape(value, rows, int(name in spec.rows_in_dim_1))))
                if name in spec.shared or name not in spec.rows:
                    parts.append((name, equal(value, memory if name in spec.shared else None)))
        except TypeError:
            return self.name, alone
        return tuple(parts)

    def join(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One call's arguments for many; a single call stays as it is."""
        first = dict(calls[0])
        spec = self.denoiser.roles_for(first)
        if len(calls) == 1 or spec is None:
            return first
        padded: dict[str, list[Any]] = {}
        for text in spec.texts:
            if text.mask and first.get(text.name) is not None:
                padded[text.name], masks = _padded(
                    [call[text.name] for call in calls], [c.get(text.mask) for c in calls]
                )
                first[text.mask], padded[text.mask] = masks[0], masks
        return first | {
            name: joined(padded.get(name) or [call[name] for call in calls], int(name in spec.rows_in_dim_1))
            for name in spec.rows
            if first.get(name) is not None
        }


def _text_shape(text: Text, value: Any, latents: Any) -> Hashable:
    """What must agree of a text whose length may differ; TypeError if it is of another kind.

    Padding costs work: the sequences of a forward, image and text, differ by no more than a quarter.
    """
    if not text.mask and isinstance(value, list) and all(isinstance(entry, torch.Tensor) for entry in value):
        return tuple((-(-len(entry) // text.padded), entry.shape[1:], entry.dtype) for entry in value)
    if isinstance(value, torch.Tensor) and value.ndim == 3 and isinstance(latents, torch.Tensor):
        return int(math.log(1 + value.shape[1] / latents.shape[1], WORTH_PADDING)), value.shape[2], value.dtype
    if value is None:
        return None
    raise TypeError(type(value))


def _padded(texts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> tuple[list[Any], list[Any]]:
    """(texts, masks) at the length of the longest; None for masks where nothing is left out."""
    longest = max(text.shape[1] for text in texts)
    if all(mask is None for mask in masks) and all(text.shape[1] == longest for text in texts):
        return list(texts), [None] * len(texts)
    dtype = next((mask.dtype for mask in masks if mask is not None), torch.bool)
    whole = [
        torch.ones(text.shape[:2], dtype=dtype, device=text.device) if mask is None else mask.to(dtype)
        for text, mask in zip(texts, masks, strict=True)
    ]
    gaps = [longest - text.shape[1] for text in texts]
    filled = [pad(text, (0, 0, 0, gap)) for text, gap in zip(texts, gaps, strict=True)]
    return filled, [pad(mask, (0, gap)) for mask, gap in zip(whole, gaps, strict=True)]


# ---------------------------------------------------------------------------------------- text encoders and decoders


def component_key(call: ComponentCall) -> Hashable | None:
    """Equal keys fit together; None if a call has an argument that cannot be compared, such as a generator."""
    named = _by_name(call)
    tensors = [value for value in named.values() if isinstance(value, torch.Tensor)]
    if not tensors or any(not tensor.ndim or len(tensor) != len(tensors[0]) for tensor in tensors):
        return None
    try:
        described = tuple(
            (name, (value.shape[1:], value.dtype) if isinstance(value, torch.Tensor) else equal(value))
            for name, value in named.items()
        )
    except TypeError:
        return None
    return call.component, call.method, described


def component_chunks(calls: Sequence[ComponentCall]) -> Iterator[slice]:
    """Calls of one key, in runs of at most MOST_JOINED elements, a call at least."""
    elements = sum(value.numel() for value in _by_name(calls[0]).values() if isinstance(value, torch.Tensor))
    most = max(1, MOST_JOINED // max(1, elements))
    for first in range(0, len(calls), most):
        yield slice(first, first + most)


def call_component(module: Any, calls: Sequence[ComponentCall]) -> list[Any]:
    """What each call returns; several of one key are made as one."""
    first = calls[0]
    method = module if first.method == "__call__" else getattr(module, first.method)
    if len(calls) == 1:
        return [method(*first.args, **first.kwargs)]
    named = [_by_name(call) for call in calls]
    joined = {
        name: torch.cat([own[name] for own in named]) if isinstance(value, torch.Tensor) else value
        for name, value in named[0].items()
    }
    output = method(*(joined[i] for i in range(len(first.args))), **{name: joined[name] for name in first.kwargs})
    slices = row_slices([next(len(v) for v in own.values() if isinstance(v, torch.Tensor)) for own in named])
    return [_own_rows(output, rows, slices[-1].stop) for rows in slices]


def _by_name(call: ComponentCall) -> dict[int | str, Any]:
    """The arguments by position or name."""
    named: dict[int | str, Any] = dict(enumerate(call.args))
    return named | dict(call.kwargs)


def _own_rows(output: Any, rows: slice, total: int) -> Any:
    """One request's rows of a component's output, in memory of its own: embeddings live as long as their request.

    What is no tensor, such as a language model's key-value cache, holds everybody's rows and is left out. TypeError for
    a tensor without one entry per row: then each call must be made alone.
    """
    if isinstance(output, torch.Tensor):
        if not output.ndim or len(output) != total:
            raise TypeError(f"an output of shape {tuple(output.shape)} for {total} rows")
        return output[rows].clone()
    if isinstance(output, dict):
        return type(output)(**{name: _own_rows(value, rows, total) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_own_rows(value, rows, total) for value in output)
    return None
