"""Runs what is dispatched to the CUDA key with the CPU's kernels, and refuses what a CUDA device would refuse.

A CUDA build of torch raises on operands of several devices, on a custom operation without a CUDA kernel, when memory is
short, and, after an error of the device, in every call. It makes the host wait where a value is read. So does this.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fake_cuda.clock import Clock

OURS, THEIRS = "vllm_omni", ("diffusers", "transformers", "accelerate")
# Take operands of several devices: copies by their nature, indexing as documented.
ACROSS_DEVICES = {"copy_", "_to_copy", "_copy_from", "set_", "index", "index_put", "index_put_", "_index_put_impl_"}
# Refuse even a scalar of the host, which element-wise operations take.
NO_HOST_SCALARS = {"cat", "stack", "mm", "addmm", "bmm", "gather", "index_select", "embedding"}
# The size of the result, or the result itself, is a value that the host must know.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc", "_unique2"}
READS |= {"unique_dim", "unique_consecutive", "_assert_async", "repeat_interleave"}
LIBRARIES = ("aten", "prims", "prim", "fake_cuda")
# Composite in torch, with decompositions that would ask for kernels or contexts that only a CUDA build has.
FACTORIES = "empty empty_like empty_strided zeros ones full arange linspace eye rand randn randint fft_fftfreq"
RANDOM = "normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ multinomial native_dropout"
LAYERS = "linear matmul convolution convolution_overrideable native_layer_norm native_group_norm rms_norm"
LAYERS += " _fused_rms_norm scaled_dot_product_attention _safe_softmax softmax silu gelu mish pad constant_pad_nd"
RESIZING = "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d"
RESIZING += " _upsample_nearest_exact2d _upsample_nearest_exact3d"
MOVING = "copy_ clone contiguous index_put_ _index_put_impl_ nonzero equal _local_scalar_dense repeat_interleave"
MATHS = "linalg_vector_norm std var var_mean cumsum bucketize searchsorted fft_fftn fft_ifftn polar"
MATHS += " view_as_complex view_as_real"


class Wait(NamedTuple):
    """The host waited: why, in which operation, for how many bytes, and who asked, the innermost first."""

    why: str
    operation: str
    nbytes: int
    callers: tuple[str, ...]

    @property
    def ours(self) -> bool:
        """Whether this project's code asked, rather than a library's that it runs."""
        return bool(self.callers) and self.callers[0].startswith(OURS)


class Device:
    """What a test sees of the device, and does to it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.kernels: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self.lost: str | None = None  # an error that every call raises from now on
        self.kernels_left: int | None = None  # then it is lost
        self._watched = False

    @contextmanager
    def watched(self) -> Iterator[list[Wait]]:
        """Within, every wait of the host is noted, with its callers."""
        self.waits, self._watched = [], True
        self.kernels.clear()
        try:
            yield self.waits
        finally:
            self._watched = False

    def wait(self, why: str, operation: str, nbytes: int = 0) -> None:
        self.check()
        if self._watched:
            self.waits.append(Wait(why, operation, nbytes, _callers()))
        self.clock.wait()

    def check(self) -> None:
        if self.lost is not None:
            raise torch.AcceleratorError(self.lost)

    def run(self, operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The operation's CPU kernel on host views of its operands; its results belong to the device."""
        library, _, name = operation._schema.name.partition("::")
        if library not in LIBRARIES:
            raise NotImplementedError(f"'{library}::{name}' has no kernel for the CUDA backend")
        launched = not _is_view(operation)
        self._count(name, launched)
        flat, tree = tree_flatten((arguments, named))
        index = self._placed(name, flat)
        self._waits_for(name, arguments, named)
        views = [(x, torch.ops.fake_cuda.host_view(x)) for x in flat if isinstance(x, torch.Tensor) and x.is_cuda]
        left = iter(views)
        host = [next(left)[1] if isinstance(x, torch.Tensor) and x.is_cuda else _host_device(x) for x in flat]
        host_arguments, host_named = tree_unflatten(host, tree)
        if host_named.get("pin_memory"):
            host_named["pin_memory"] = False
        returned = operation(*host_arguments, **host_named)
        if operation._schema.is_mutable:
            for tensor, view in views:
                torch.ops.fake_cuda.follow(tensor, view)
        results, shape = tree_flatten(returned)
        known = {id(view): tensor for tensor, view in views} | {id(x): x for x in flat}
        placed = [self._result(x, known, index, name, arguments) for x in results]
        if launched:
            self.clock.launch(operation._schema.name, flat, [x for x in placed if isinstance(x, torch.Tensor)])
        return tree_unflatten(placed, shape)

    def _count(self, name: str, launched: bool) -> None:
        self.kernels[name] += launched
        if self.kernels_left is not None:
            self.kernels_left -= 1
            if self.kernels_left <= 0:
                self.lost = self.lost or "CUDA error: an illegal memory access was encountered"
        self.check()

    @staticmethod
    def _result(x: Any, known: dict[int, Any], index: int, name: str, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return arguments[0] if name == "copy_" else torch.ops.fake_cuda.to_device(x, index)

    @staticmethod
    def _placed(name: str, flat: list[Any]) -> int:
        """The index of the device that the operands are on; RuntimeError if they are on several."""
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        there = {x.device.index for x in tensors if x.is_cuda}
        asked = [x for x in flat if isinstance(x, torch.device) and x.type == "cuda"]
        strangers = [x for x in tensors if not x.is_cuda and (x.ndim or name in NO_HOST_SCALARS)]
        if name not in ACROSS_DEVICES and (len(there) > 1 or (there and strangers)):
            places = sorted({str(x.device) for x in tensors})
            found = " and ".join(places)
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {name}")
        if name.startswith(("index", "_index")) and tensors and not tensors[0].is_cuda and name in ACROSS_DEVICES:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if asked:
            return asked[0].index if asked[0].index is not None else -1
        return min(there) if there else -1

    def _waits_for(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name == "copy_":
            to, source = arguments[:2]
            free = arguments[2] if len(arguments) > 2 else named.get("non_blocking", False)
            if to.is_cuda != source.is_cuda and not (free and to.is_cuda):
                self.wait("copy to the device" if to.is_cuda else "copy to the host", name, source.nbytes)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in arguments[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("indices from a mask", name)
            elif any(not index.is_cuda for index in indices):
                self.wait("copy to the device", name, sum(index.nbytes for index in indices))
        elif name in READS:
            self.wait("value read", name)


def register(device: Device) -> list[torch.library.Library]:
    """Let the CUDA key lead here, for good: it cannot be undone within a process, and disturbs nobody."""

    def through(operation: Any) -> Callable[..., Any]:
        return lambda *arguments, **named: device.run(operation, arguments, named)

    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda operation, *arguments, **named: device.run(operation, arguments, named), "CUDA")
    some = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a composite operation loses its gradient, which nothing here asks for
        for name in f"{FACTORIES} {RANDOM} {LAYERS} {RESIZING} {MOVING} {MATHS}".split():
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                operation = getattr(packet, overload)
                some.impl(operation.name().removeprefix("aten::"), through(operation), "CUDA")
    return [every, some]


@cache
def _is_view(operation: Any) -> bool:
    """Whether the operation launches nothing: its result is another look at an operand, or memory without values."""
    returned = operation._schema.returns
    alias = returned[0].alias_info if returned else None
    return (alias is not None and not alias.is_write) or operation.__name__.startswith(("empty", "new_empty"))


def _host_device(x: Any) -> Any:
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _callers(most: int = 4) -> tuple[str, ...]:
    """The innermost lines of this project and of the libraries that it runs."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < most:
        for package in (OURS, *THEIRS):
            _, mark, inside = frame.f_code.co_filename.rpartition(f"/{package}/")
            if mark:
                found.append(f"{package}/{inside}:{frame.f_lineno} {frame.f_code.co_name}")
                break
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
