"""Rows: the samples of a denoiser call. What must agree for two calls to be joined, joining, and splitting.

Knows no request, and not which argument has which role.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

READ_AGAIN = 4096  # elements
_PLAIN = (bool, int, float, str)


def latents_of(arguments: Mapping[str, Any]) -> Any:
    """The latents of a denoiser call: a tensor with one row per sample, or a list of them.

    If they have another name than diffusers' own, they are the argument of real numbers with the most dimensions.
    """
    if "hidden_states" in arguments:
        return arguments["hidden_states"]
    return max(arguments.values(), key=_dimensions)


def _dimensions(value: Any) -> int:
    first = value[0] if isinstance(value, list) and value else value
    return first.ndim if isinstance(first, torch.Tensor) and first.dtype.is_floating_point else -1


def row_slices(counts: Sequence[int]) -> list[slice]:
    """The place of each call's rows in the joined batch."""
    return [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]


def take_rows(output: Any, rows: slice) -> Any:
    """One request's part of a denoiser's output: a tensor or list of rows, in a tuple or a dict-like model output."""
    if isinstance(output, torch.Tensor | list):
        return output[rows]
    if isinstance(output, dict):
        return type(output)(**{name: take_rows(value, rows) for name, value in output.items()})
    if isinstance(output, tuple):
        parts = [take_rows(value, rows) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output


def made_of_rows(output: Any, rows: int | None = None) -> bool:
    """Whether a denoiser's output is tensors or lists of them, `rows` long if that is given, alone or several."""
    if isinstance(output, torch.Tensor):
        return output.ndim > 0 and len(output) == (rows or len(output))
    if type(output) is list:
        return all(isinstance(one, torch.Tensor) for one in output) and len(output) == (rows or len(output))
    if type(output) is tuple or (isinstance(output, dict) and type(output) is not dict):  # a model output of diffusers
        values = output if isinstance(output, tuple) else [*output.values()]
        return bool(values) and all(made_of_rows(value, rows) for value in values)
    return False


def for_each(value: Any, rows: int) -> Any:
    """A list of one entry that stands for all of a call's rows, as a list of one for each; anything else as it is."""
    return value * rows if isinstance(value, list) and len(value) == 1 else value


def row_shape(value: Any, rows: int, dim: int) -> Hashable:
    """What must agree of an argument with one entry per row; TypeError if it is none."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor) and len(shape := value.shape) > dim and shape[dim] == rows:
        return shape[:dim], shape[dim + 1 :], value.dtype
    if isinstance(value, list) and len(value) == rows:
        entries = tuple((e.shape, e.dtype) if isinstance(e, torch.Tensor) else equal(e) for e in value)
        return entries[0] if len(set(entries)) == 1 else entries
    if isinstance(value, dict):
        return tuple((name, row_shape(entry, rows, dim)) for name, entry in value.items())
    raise TypeError(type(value))


def equal(value: Any, memory: dict[Any, Any] | None = None) -> Hashable:
    """A hashable that is equal if the argument's content is; TypeError if that cannot be said.

    Without `memory` a tensor is refused: only one that is described as shared may serve other requests' rows.
    """
    if value is None or isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, torch.Tensor) and memory is not None:
        return _content(value, memory)
    if isinstance(value, dict):
        return tuple((key, equal(entry, memory)) for key, entry in value.items())
    if isinstance(value, tuple | list):
        return tuple(equal(entry, memory) for entry in value)
    raise TypeError(type(value))


def joined(values: Sequence[Any], dim: int) -> Any:
    first = values[0]
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    if isinstance(first, dict):
        return {name: joined([value[name] for value in values], dim) for name in first}
    return torch.cat(list(values), dim) if first is not None else None


def _content(tensor: torch.Tensor, memory: dict[Any, Any]) -> Hashable:
    """Read once per request; a small tensor of the host's, which may be written in place, is compared with what it was.

    Of any dtype, complex ones too.
    """
    small = tensor.numel() <= READ_AGAIN and tensor.device.type == "cpu"
    form = tensor.dtype, tensor.shape
    known = memory.get(place := form if small else id(tensor))
    if known is None or not (torch.equal(known[0], tensor) if small else known[0] is tensor):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        known = memory[place] = tensor.clone() if small else tensor, (*form, hash(values.tobytes()))
    return known[1]
