"""The result of a call before the call is made: tensors of known form that are filled later. Knows no model.

Whoever takes views of a promised tensor gets promised tensors. Whoever does anything else with one asks for it first,
and gets an ordinary tensor. Until it is kept a promised tensor holds NaN, so that nothing could be taken for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from vllm_omni.nested import tensors_in

_PLAIN = (bool, int, float, str, type(None))
# By torch's names. Of the first, a result in other memory is a copy, and then the tensor is asked for after all.
_VIEWS = frozenset((
    "__getitem__", "__get__", "view", "reshape", "flatten", "unflatten", "chunk", "split", "tensor_split", "unbind",
    "narrow", "select", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "expand", "expand_as", "view_as",
    "detach", "contiguous", "to", "float", "type_as",
))  # fmt: skip
_ABOUT = frozenset((
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "__len__", "__hash__", "get_device",
    "is_complex", "is_floating_point", "is_contiguous", "is_inference",
))  # fmt: skip


class Form(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class PromisedTensor(torch.Tensor):
    """A tensor, or a view of one, that `promise` fills."""

    promise: Promise

    @staticmethod
    def of(tensor: torch.Tensor, promise: Promise) -> PromisedTensor:
        """`tensor` itself, promised."""
        promised: PromisedTensor = torch.Tensor._make_subclass(PromisedTensor, tensor)
        promised.promise = promise
        return promised

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first, name = args[0] if args else None, func.__name__
        if isinstance(first, PromisedTensor) and not any(holds_promised(value) for value in (args[1:], kwargs)):
            if name in _ABOUT:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name in _VIEWS and not first.promise.kept:
                with torch._C.DisableTorchFunctionSubclass():
                    seen = func(first.as_subclass(torch.Tensor), *args[1:], **kwargs)
                    if _within(seen, first):
                        return mapped(lambda one: _promised(one, first.promise), seen)
        args, kwargs = kept((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class Promise:
    """What a call will return, in the form `form_of` has found; `ask` must not return before `keep` was called."""

    def __init__(self, form: Any, ask: Callable[[], None]) -> None:
        self.kept = False
        self._ask: Callable[[], None] | None = ask
        self.value = mapped(lambda like: PromisedTensor.of(_nothing(like), self), form)

    def keep(self, result: Any) -> None:
        """Fill the promised tensors with `result`."""
        with torch._C.DisableTorchFunctionSubclass():
            for promised, tensor in zip(tensors_in(self.value), tensors_in(result), strict=True):
                if promised.shape != tensor.shape:
                    raise RuntimeError(f"a call returned {tuple(tensor.shape)}, promised was {tuple(promised.shape)}")
                promised.as_subclass(torch.Tensor).copy_(tensor)
        self.kept, self.value, self._ask = True, None, None

    def ask(self) -> None:
        """Have it kept."""
        if self._ask is not None:
            self._ask()
        if not self.kept:
            raise RuntimeError("a promised tensor was used before its call was made")


def form_of(result: Any) -> Any:
    """The result with a `Form` in the place of each tensor; TypeError if something in it is of another kind."""
    if isinstance(result, torch.Tensor):
        return Form(result.shape, result.dtype, result.device)
    if isinstance(result, _PLAIN):
        return result
    if isinstance(result, Mapping) or type(result) in (list, tuple):
        return mapped(form_of, result)
    raise TypeError(type(result))


def holds_promised(value: Any) -> bool:
    """Whether a promised tensor is in an argument."""
    return any(isinstance(tensor, PromisedTensor) for tensor in tensors_in(value))


def kept(value: Any) -> Any:
    """The argument with ordinary tensors, after asking for those that are promised."""
    if not holds_promised(value):
        return value

    def asked(tensor: Any) -> Any:
        if not isinstance(tensor, PromisedTensor):
            return tensor
        tensor.promise.ask()
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(torch.Tensor)

    return mapped(asked, value)


def mapped(act: Callable[[Any], Any], value: Any) -> Any:
    """New lists, tuples and dicts of the same kinds, with what `act` makes of everything else but plain values."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        entries = {name: mapped(act, entry) for name, entry in value.items()}
        return entries if type(value) is dict else type(value)(**entries)
    if type(value) in (list, tuple):
        return type(value)(mapped(act, entry) for entry in value)
    return act(value)


def _promised(value: Any, promise: Promise) -> Any:
    return PromisedTensor.of(value, promise) if isinstance(value, torch.Tensor) else value


def _nothing(like: Form) -> torch.Tensor:
    filler = float("nan") if like.dtype.is_floating_point or like.dtype.is_complex else 0
    return torch.full(like.shape, filler, dtype=like.dtype, device=like.device)


def _within(value: Any, of: torch.Tensor) -> bool:
    """Whether all tensors of a result are in that tensor's memory."""
    own = of.untyped_storage().data_ptr()
    return all(tensor.untyped_storage().data_ptr() == own for tensor in tensors_in(value))
