"""Two CUDA devices in a CPU build of torch: memory is the host's, kernels are the CPU's, the dispatch key is CUDA's.

What only a GPU shows otherwise: operations that mix devices raise, custom operations without a CUDA kernel raise,
allocations meet a limit of their device, a lost device stays lost, each wait of the host for the device is noted with
the lines that asked, and the device may have a clock of its own, behind the host's. What it does not show: the numerics
of real kernels, streams, races, true speed.

    from fake_cuda import device, installed
    with installed():                       # torch.cuda says yes; outside it says no, as before
        with device.watched() as waits: ...
        with limit(bytes): ...
        with device.clock.at(flops=2e7): ...

`site/` does the same for a process of its own (an engine's), by PYTHONPATH and the variables in its sitecustomize.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch

from fake_cuda.build import CannotBuildError, library
from fake_cuda.clock import Event
from fake_cuda.dispatch import Device, Wait, register

__all__ = ["CannotBuildError", "Wait", "device", "installed", "library", "limit", "peak", "reset_peak", "used"]

DEVICES, TOTAL_BYTES = 2, 80 * 2**30
device = Device()
_limits = dict.fromkeys(range(DEVICES), 0)


@cache
def _loaded() -> ctypes.CDLL:
    path = library()
    torch.ops.load_library(path)
    counters = ctypes.CDLL(str(path))
    for name in ("used", "peak"):
        getattr(counters, f"fake_cuda_{name}").restype = ctypes.c_int64
    counters.fake_cuda_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    vars(device)["libraries"] = register(device)  # they live as long as the process
    return counters


def used(index: Any = None) -> int:
    """Bytes in use on a device, the current one if None."""
    return int(_loaded().fake_cuda_used(_index(index)))


def peak(index: Any = None) -> int:
    return int(_loaded().fake_cuda_peak(_index(index)))


def reset_peak(index: Any = None) -> None:
    _loaded().fake_cuda_reset_peak(_index(index))


@contextmanager
def limit(nbytes: int, index: int = 0) -> Iterator[None]:
    """Within, the device has `nbytes` in all."""
    before, _limits[index] = _limits[index], nbytes
    _loaded().fake_cuda_limit(index, nbytes)
    try:
        yield
    finally:
        _limits[index] = before
        _loaded().fake_cuda_limit(index, before)


@contextmanager
def installed() -> Iterator[Device]:
    """Within, `torch.cuda` answers for the fake devices. CannotBuildError if they cannot be had here."""
    counters = _loaded()
    with ExitStack() as undo:
        for name, value in _answers(counters).items():
            undo.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, answer in (("is_pinned", False), ("pin_memory", None), ("record_stream", None)):
            undo.enter_context(mock.patch.object(torch.Tensor, name, _tensor_method(name, answer)))
        undo.enter_context(mock.patch.object(torch.Tensor, "__deepcopy__", _deep_copy(torch.Tensor.__deepcopy__)))
        yield device
        device.lost = device.kernels_left = None


def _tensor_method(name: str, answer: Any) -> Any:
    return lambda tensor, *arguments, **named: tensor if name == "pin_memory" else answer


def _deep_copy(own: Any) -> Any:
    """Torch copies a storage by its device's name, which a CPU build does not know."""

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if not tensor.is_cuda or isinstance(tensor, torch.nn.Parameter):
            return own(tensor, memo)
        return memo.setdefault(id(tensor), tensor.detach().clone())

    return copied


def _answers(counters: ctypes.CDLL) -> dict[str, Any]:
    def total(index: Any = None) -> int:
        return _limits[_index(index)] or TOTAL_BYTES

    def quiet() -> Any:
        return lambda *arguments, **named: None  # one for each name: torch's compiler tells them apart by identity

    class Stream:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.device = torch.device("cuda", counters.fake_cuda_current())

        wait_event = wait_stream = quiet()

        def synchronize(self) -> None:
            device.wait("synchronize", "stream")

        def record_event(self, event: Any = None) -> Any:
            return event or Event(device.clock)

        def query(self) -> bool:
            device.check()
            return device.clock.idle

    class CudaEvent(Event):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(device.clock)

        def query(self) -> bool:
            device.check()
            return super().query()

    def exchange(index: int) -> int:
        before = int(counters.fake_cuda_current())
        if index >= 0:
            counters.fake_cuda_set_current(index)
        return before

    stream = Stream()
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *arguments, **named: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: int(counters.fake_cuda_current()),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "set_device": lambda index: counters.fake_cuda_set_current(_index(index)),
        "get_device_name": lambda index=None: "fake",
        "get_device_capability": lambda index=None: (9, 0),
        "get_arch_list": lambda: ["sm_75", "sm_90", "compute_90"],
        "synchronize": lambda index=None: device.wait("synchronize", f"device {_index(index)}"),
        "memory_allocated": used,
        "memory_reserved": lambda index=None: used(index),
        "max_memory_allocated": peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda index=None: (total(index) - used(index), total(index)),
        "empty_cache": quiet(),
        "ipc_collect": quiet(),
        "manual_seed": quiet(),
        "manual_seed_all": quiet(),
        "_lazy_init": quiet(),
        "_is_in_bad_fork": lambda: False,
        "Stream": Stream,
        "Event": CudaEvent,
        "current_stream": lambda index=None: stream,
        "default_stream": lambda index=None: stream,
        "stream": lambda stream: nullcontext(),
    }


def _index(given: Any) -> int:
    if isinstance(given, int):
        return given
    index = torch.device(given).index if given is not None else None
    return int(_loaded().fake_cuda_current()) if index is None else index
