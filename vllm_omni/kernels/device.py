"""The device that a model runs on: its memory, its time, and the errors after which it is of no use.

Nothing here makes the host wait for it.
"""

from __future__ import annotations

import gc
import re
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from vllm_omni.errors import DeviceLostError, DeviceMemoryError, forget_locals
from vllm_omni.nested import mapped

Mark = Any  # a float of the host's clock, or an event of a device that runs behind it
Span = tuple[Mark, Mark]
R = TypeVar("R")
Guard = Callable[[Callable[[], Any]], Any]  # makes what may fail; of several ranks, on all alike or on none

# What CUDA, Triton, cuBLAS and cuDNN report, some as plain RuntimeErrors, once the context has gone.
_LOST = re.compile(
    r"CUDA error:|Triton Error \[CUDA\]:"
    r"|CU(BLAS|DNN|SOLVER|SPARSE|FFT)_\w*(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
# What CUDA refuses to do, and goes on: a grid that is too large, say.
_REFUSED = re.compile(
    r"invalid (argument|configuration argument|pitch argument|device symbol|device function|device ordinal|texture"
    r"|resource handle)|too many resources requested|no kernel image|operation not (supported|permitted)"
    r"|device not ready|named symbol not found|already (mapped|registered)"
    r"|STATUS_(NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM|ARCH_MISMATCH)"
)
# Creating a handle of cuBLAS or cuDNN needs memory, too, and says so in its own way.
_SHORT = re.compile(r"CUDA (error: )?out of memory|CU(BLAS|DNN)_\w*(ALLOC_FAILED|NOT_INITIALIZED)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room; it goes on as before."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _SHORT.search(str(error)) is not None


def is_lost(error: BaseException | None) -> bool:
    """Whether every further call on the device will fail in this process, as after an illegal memory access.

    Also of an error that was raised because of such a one, or while such a one was handled.
    """
    seen: list[BaseException] = []
    while error is not None and not any(error is other for other in seen):
        if _tells_of_loss(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _tells_of_loss(error: BaseException) -> bool:
    if isinstance(error, DeviceLostError | torch.distributed.DistBackendError):  # NCCL's communicators are gone, too
        return True
    if is_out_of_memory(error) or _REFUSED.search(str(error)) is not None:
        return False
    told = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    return told or isinstance(error, torch.AcceleratorError)


def lost_by(error: BaseException) -> DeviceLostError:
    """The error as the device's end; its tensors are let go."""
    without_tensors(error)
    if isinstance(error, DeviceLostError):
        return error
    return DeviceLostError(f"the device is lost: {str(error).splitlines()[0]}")


def refuse_lost(error: BaseException | None) -> None:
    """Raise DeviceLostError for an error after which the device is of no use to this process."""
    if error is not None and is_lost(error):
        raise lost_by(error) from error


def without_tensors(error: Exception | BaseException) -> Any:
    """The error, whose traceback holds the locals of no frame: tensors of a failed forward would stay in memory.

    Of a lack of memory the message alone stays: what a frame's closures hold outlives its locals.
    """
    forget_locals(error)
    if is_out_of_memory(error):
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def let_go(error: BaseException | None) -> None:
    """Free the tensors that a failure holds; DeviceLostError if the device is lost."""
    if error is not None:
        refuse_lost(error)
        without_tensors(error)


def tried(act: Callable[[], R]) -> tuple[R | None, Exception | None]:
    """What an action returns, or raises; DeviceLostError if the device is lost."""
    try:
        return act(), None
    except Exception as error:  # out of memory or a bad input of one must not end the others
        let_go(error)
        return None, error


def plainly(act: Callable[[], R]) -> R:
    """The `Guard` of one device."""
    return act()


def moved(value: Any, device: torch.device | None) -> Any:
    """A request's argument with every tensor in it on `device`; what came over a socket came to the CPU."""
    return value if device is None else mapped(value, lambda tensor: tensor.to(device))


class Memory:
    """Bytes of one device; of the CPU, those of the process."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._peak = 0  # before the last `begin`
        self._agreed: int | None = None

    def agree(self, room: int | None) -> None:
        """Plan with `room` free bytes from now on, whatever is free here: several ranks decide alike."""
        self._agreed = room

    def peak(self) -> int:
        """The most bytes that were in use since the last time it was asked; on a CPU, ever."""
        if self._device is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        most, self._peak = max(self._peak, self.most()), 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return most

    def begin(self) -> int:
        """Bytes in use now; `most` counts from here."""
        if self._device is None:
            return 0
        self._peak = max(self._peak, self.most())
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def most(self) -> int:
        """The most bytes that were in use since `begin` or `peak`; 0 on a CPU."""
        return 0 if self._device is None else torch.cuda.max_memory_allocated(self._device)

    def free(self, share: float = 1.0) -> int | None:
        """Bytes that this process may still take of `share` of the device; None on a CPU."""
        if self._device is None or self._agreed is not None:
            return self._agreed
        free, total = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(0, int(free + kept - (1.0 - share) * total))

    def spare(self) -> int:
        """Bytes that nobody needed since `begin`, less a part that cannot be had in one piece.

        0 on a CPU, and where several ranks decide alike.
        """
        if self._device is None or self._agreed is not None:
            return 0
        free, most = self.free() or 0, self.most()
        return max(0, int(0.9 * (free + torch.cuda.memory_allocated(self._device) - most)))

    def collect(self) -> int:
        """Let go of what only a garbage collection finds, and of what torch keeps for later; returns the bytes."""
        if self._device is None:
            return 0
        before = torch.cuda.memory_allocated(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        freed = max(0, before - torch.cuda.memory_allocated(self._device))
        return freed if self._agreed is None else 0

    def too_large(self, error: Exception, decoding: bool, wanted: int, largest: int) -> DeviceMemoryError:
        """What to say of a request that met `error` alone: of `wanted` latent elements, where `largest` have run."""
        free = self.free()
        room = "" if free is None else f", with {free >> 20} MiB free beside the model"
        if decoding:
            fix = "set vae_use_tiling and vae_use_slicing, or ask for a smaller size, or fewer frames or pictures"
        elif 0 < largest < wanted:
            fix = f"ask for at most {largest / wanted:.0%} of its pixels, frames and pictures: so much has run here"
        else:
            fix = "ask for a smaller size, or fewer frames or pictures, or set enable_cpu_offload"
        failure = DeviceMemoryError(f"the request does not fit on {self} even alone{room}; {fix}")
        failure.__cause__ = error.with_traceback(None)  # its last frames hold the request
        return failure

    def __str__(self) -> str:
        return str(self._device or "cpu")


class _Event(NamedTuple):
    """A mark of a device that runs behind the host."""

    event: Any
    recorded: float  # when the host asked for it


class DeviceClock:
    """When the device has done what it was given, in the seconds of the host's `time.perf_counter`.

    A CUDA device runs behind the host: there a mark is an event, and what depends on it is done by a later `poll`, once
    the event has come by itself. On a CPU everything is done at once.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._pending: deque[tuple[_Event, Callable[[], None]]] = deque()
        self._base: tuple[Any, float] | None = None  # an event, and when it was on the host's clock

    def mark(self) -> Mark:
        """Now, in the order of the device's work."""
        if self._device is None:
            return time.perf_counter()
        stream, event = torch.cuda.current_stream(self._device), torch.cuda.Event(enable_timing=True)
        idle = not self._pending and stream.query()
        event.record(stream)
        mark = _Event(event, time.perf_counter())
        if self._base is None or idle:  # both clocks show the same moment
            self._base = mark
        return mark

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Between two marks that the device has passed."""
        return end - begin if self._device is None else float(begin.event.elapsed_time(end.event)) / 1e3

    def when(self, mark: Mark) -> float:
        """The moment of a mark that the device has passed.

        Counted from the last one that was asked for: over hours both clocks drift apart, and CUDA tells milliseconds as
        a float of 32 bits. No mark comes before it was asked for, or after it was seen.
        """
        if self._base is None:
            return float(mark)
        event, at = self._base
        at = min(max(at + float(event.elapsed_time(mark.event)) / 1e3, mark.recorded), time.perf_counter())
        self._base = mark.event, at
        return at

    def later(self, mark: Mark, act: Callable[[], None]) -> None:
        """Call `act` as soon as the device has passed `mark`, in the order of the marks."""
        if self._device is None:
            act()
        else:
            self._pending.append((mark, act))

    def abandon(self) -> None:
        """Forget what was left for later: the device is lost."""
        self._pending.clear()

    def poll(self) -> None:
        """Do what was left for now; never waits."""
        while self._pending and self._pending[0][0].event.query():
            self._pending.popleft()[1]()


def current(device: torch.device | None) -> AbstractContextManager[Any]:
    """A scope in which a CUDA device is the current one: where kernels go that are not told by a tensor (Triton's)."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


class Autocast:
    """`torch.autocast` in this thread: by kind of device the type it computes in, or None. Read and set like a dict."""

    def keys(self) -> tuple[str, ...]:
        return "cpu", "cuda"

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def values(self) -> list[torch.dtype | None]:
        return [self[kind] for kind in self.keys()]

    def __getitem__(self, kind: str) -> torch.dtype | None:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def get(self, kind: str, default: object) -> torch.dtype | None:
        return self[kind]

    def __setitem__(self, kind: str, dtype: torch.dtype | None) -> None:
        torch.set_autocast_enabled(kind, dtype is not None)
        if dtype is not None:
            torch.set_autocast_dtype(kind, dtype)
