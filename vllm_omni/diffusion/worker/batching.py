"""Joining parked denoiser calls into one, and splitting the result. Tensors only; knows no cache and no policy."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.specs import DenoiserSpec


class CallBinder:
    """For one denoiser: positional arguments by name, and which calls may share a forward."""

    def __init__(self, name: str, module: torch.nn.Module, spec: DenoiserSpec | None) -> None:
        self.name, self.spec = name, spec
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._rows = frozenset(spec.rows) if spec else frozenset()
        self._shared = frozenset(spec.shared) if spec else frozenset()
        self._dims = dict.fromkeys(spec.rows_in_dim_1, 1) if spec else {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._names, args, strict=False)) | kwargs

    def rows(self, arguments: dict[str, Any]) -> int:
        """How many samples the call holds."""
        hidden = arguments["hidden_states"] if "hidden_states" in arguments else next(iter(arguments.values()))
        return len(hidden)

    def adds_between_blocks(self, arguments: dict[str, Any]) -> bool:
        return self.spec is not None and self.spec.adds_between_blocks(arguments)

    def key(self, arguments: dict[str, Any], alone: Hashable, memory: dict[int, Any]) -> Hashable:
        """Equal keys fit together. A class without a description, or an argument we cannot compare, goes `alone`.

        `memory` is the request's own: a shared tensor is read once per request, not once per step.
        """
        if self.spec is None or self.adds_between_blocks(arguments):
            return self.name, alone
        rows = self.rows(arguments)
        parts: list[Hashable] = [self.name]
        try:
            for name, value in arguments.items():
                if name in self._rows:
                    parts.append((name, _row_shape(value, rows, self._dims.get(name, 0))))
                if name in self._shared or name not in self._rows:
                    parts.append((name, equal(value, memory if name in self._shared else None)))
        except TypeError:
            return self.name, alone
        return tuple(parts)

    def join(self, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One call's arguments for many; a single call stays as it is."""
        if len(calls) == 1:
            return calls[0]
        first = calls[0]
        return first | {
            name: _joined([call[name] for call in calls], self._dims.get(name, 0))
            for name in self._rows
            if first.get(name) is not None
        }


def row_slices(counts: Sequence[int]) -> list[slice]:
    """Where each call's rows lie in the joined batch."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def take_rows(output: Any, rows: slice) -> Any:
    """One request's part of a denoiser's output: a tensor or list of rows, in a tuple or a dict-like model output."""
    if isinstance(output, torch.Tensor | list):
        return output[rows]
    if isinstance(output, dict):
        return type(output)(**{name: take_rows(value, rows) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(take_rows(value, rows) for value in output)
    return output


def _row_shape(value: Any, rows: int, dim: int) -> Hashable:
    """What must agree of an argument with one entry per row; TypeError where it is not one."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor) and value.ndim > dim and value.shape[dim] == rows:
        return value.shape[:dim], value.shape[dim + 1 :], value.dtype
    if isinstance(value, list) and len(value) == rows:
        entries = tuple((e.shape, e.dtype) if isinstance(e, torch.Tensor) else equal(e) for e in value)
        return entries[0] if len(set(entries)) == 1 else entries
    if isinstance(value, dict):
        return tuple((name, _row_shape(entry, rows, dim)) for name, entry in value.items())
    raise TypeError(type(value))


def equal(value: Any, memory: dict[int, Any] | None = None) -> Hashable:
    """A hashable that is equal where the argument's content is; TypeError where we cannot say.

    Without `memory` a tensor is refused: only one that is described as shared may serve other requests' rows.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return type(value).__name__, value
    if isinstance(value, torch.Tensor) and memory is not None:
        return _content(value, memory)
    if isinstance(value, dict):
        return tuple((key, equal(entry, memory)) for key, entry in value.items())
    if isinstance(value, tuple | list):
        return tuple(equal(entry, memory) for entry in value)
    raise TypeError(type(value))


def _joined(values: Sequence[Any], dim: int) -> Any:
    first = values[0]
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values], dim) for name in first}
    return torch.cat(list(values), dim) if first is not None else None


def _content(tensor: torch.Tensor, memory: dict[int, Any]) -> Hashable:
    known = memory.get(id(tensor))
    if known is None or known[0] is not tensor:
        content = (tensor.dtype, tensor.shape, hash(tensor.detach().cpu().float().numpy().tobytes()))
        memory[id(tensor)] = known = (tensor, content)
    return known[1]
