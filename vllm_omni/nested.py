"""Tensors in lists and mappings, as denoisers take and return them, to walk, map and compare; modules in modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in an output, or in an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping | list | tuple):
        return [t for entry in (value.values() if isinstance(value, Mapping) else value) for t in tensors_in(entry)]
    return []


def modules_in(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A module and all in it, each once: what `modules()` gives, in another order and a fifth of the time."""
    found, seen = [module], {id(module)}
    for one in found:
        for child in one._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def mapped(value: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same lists and mappings, with other tensors in them."""
    if isinstance(value, torch.Tensor):
        return act(value)
    if isinstance(value, Mapping):
        return {name: mapped(entry, act) for name, entry in value.items()}
    return type(value)(mapped(v, act) for v in value) if type(value) in (list, tuple) else value


def copied(value: Any) -> Any:
    """A copy that a call may write into."""
    return mapped(value, torch.Tensor.clone)


def identical(one: Any, other: Any) -> bool:
    """Bit by bit."""
    ones, others = tensors_in(one), tensors_in(other)
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def largest_difference(got: Any, wanted: Any) -> float:
    """By the largest value of what is wanted; infinite if shapes differ, or for what is not a number."""
    gots, wanteds = tensors_in(got), tensors_in(wanted)
    if [tensor.shape for tensor in gots] != [tensor.shape for tensor in wanteds]:
        return float("inf")
    worst = 0.0
    for one, other in zip(map(_wide, gots), map(_wide, wanteds), strict=True):
        if other.numel():
            size = max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
            difference = float((one - other).abs().max()) / size
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def rms_difference(got: Any, wanted: Any) -> float:
    """The root mean square of the difference, by that of what is wanted. ValueError if there is more of one of them."""
    pairs = list(zip(map(_wide, tensors_in(got)), map(_wide, tensors_in(wanted)), strict=True))
    size = sum(float(other.abs().pow(2).sum()) for _, other in pairs)
    return (sum(float((one - other).abs().pow(2).sum()) for one, other in pairs) / max(size, 1e-300)) ** 0.5


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
