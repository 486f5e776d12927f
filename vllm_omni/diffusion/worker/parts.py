"""Calls of text encoders and decoders: which of them may be made as one, and making them. Tensors only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from vllm_omni.diffusion.worker.batching import equal, row_slices
from vllm_omni.diffusion.worker.coroutine import ComponentCall

# Input elements of a joint call: the latents of one FLUX picture of 1024 by 1024. Decoding several small pictures at
# once must not need more memory than a large one does, and large ones fill the machine one by one.
MOST_JOINED = 2**18


def key(call: ComponentCall) -> Hashable | None:
    """Equal keys fit together; None where a call holds what cannot be compared, such as a generator, and goes alone."""
    named = [*enumerate(call.args), *call.kwargs.items()]
    tensors = [value for _, value in named if isinstance(value, torch.Tensor)]
    if not tensors or any(not tensor.ndim or len(tensor) != len(tensors[0]) for tensor in tensors):
        return None
    try:
        described = tuple(
            (name, (value.shape[1:], value.dtype) if isinstance(value, torch.Tensor) else equal(value))
            for name, value in named
        )
    except TypeError:
        return None
    return call.part, call.method, described


def chunks(calls: Sequence[ComponentCall]) -> Iterator[slice]:
    """Calls of one key, in runs of at most MOST_JOINED elements, a call at least."""
    most = max(1, MOST_JOINED // max(1, _elements(calls[0])))
    for first in range(0, len(calls), most):
        yield slice(first, first + most)


def run(module: Any, calls: Sequence[ComponentCall]) -> list[Any]:
    """What each call returns; several of one key are made as one."""
    first = calls[0]
    method = module if first.method == "__call__" else getattr(module, first.method)
    if len(calls) == 1:
        return [method(*first.args, **first.kwargs)]
    args = [_joined([call.args[i] for call in calls]) for i in range(len(first.args))]
    output = method(*args, **{name: _joined([call.kwargs[name] for call in calls]) for name in first.kwargs})
    slices = row_slices([_rows(call) for call in calls])
    return [_own_rows(output, rows, slices[-1].stop) for rows in slices]


def _tensors(call: ComponentCall) -> list[torch.Tensor]:
    return [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, torch.Tensor)]


def _rows(call: ComponentCall) -> int:
    return len(_tensors(call)[0])


def _elements(call: ComponentCall) -> int:
    return sum(tensor.numel() for tensor in _tensors(call))


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]


def _own_rows(output: Any, rows: slice, total: int) -> Any:
    """One request's part, in memory of its own: embeddings live as long as their request.

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
