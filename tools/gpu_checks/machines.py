"""The device under a check: a CPU, a GPU, or the fake GPU of the tests. What one cannot show is None."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("vllm_omni", "diffusers", "transformers", "accelerate")
Waits = list[tuple[bool, str]]  # whether ours asked, and which line


class Machine:
    """A CPU, and what all machines share."""

    kind = "cpu"

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @property
    def name(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"

    def synchronize(self) -> None:
        """Return when the device has done all that it was given."""

    def seconds(self, job: Callable[[], Any]) -> float:
        """From an idle device to an idle device."""
        self.synchronize()
        began = time.perf_counter()
        job()
        self.synchronize()
        return time.perf_counter() - began

    def total(self) -> int:
        """Bytes of the device."""
        return int(next(line for line in Path("/proc/meminfo").open() if line.startswith("MemTotal")).split()[1]) * 1024

    def free(self) -> int:
        return self.total() - 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def used(self) -> int | None:
        return None

    @contextmanager
    def limited(self, nbytes: int) -> Iterator[None]:
        """Within, the device has no more than `nbytes`."""
        yield

    def peak(self, job: Callable[[], Any]) -> int | None:
        """The most bytes that were in use during a job."""
        job()
        return None

    def waits(self, job: Callable[[], Any]) -> Waits | None:
        """Each time that the host waited for the device during a job."""
        job()
        return None

    def kernels(self, job: Callable[[], Any]) -> int | None:
        """Kernels that ran on the device during a job."""
        job()
        return None


class Gpu(Machine):
    """A CUDA device."""

    kind = "cuda"

    @property
    def name(self) -> str:
        capability = ".".join(map(str, torch.cuda.get_device_capability(self.device)))
        return f"{torch.cuda.get_device_name(self.device)}, compute capability {capability}"

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1])

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def used(self) -> int | None:
        return int(torch.cuda.memory_allocated(self.device))

    @contextmanager
    def limited(self, nbytes: int) -> Iterator[None]:
        """What is more is taken for as long: a fraction that torch may take is not seen where the engine looks."""
        torch.cuda.empty_cache()
        more = self.free() - max(0, nbytes - int(torch.cuda.memory_reserved(self.device)))
        ballast = torch.empty(max(0, more), dtype=torch.uint8, device=self.device)
        try:
            yield
        finally:
            del ballast
            torch.cuda.empty_cache()

    def peak(self, job: Callable[[], Any]) -> int | None:
        """The engine resets torch's own peak after every step, so the largest of its answers counts."""
        most, reset = 0, torch.cuda.reset_peak_memory_stats

        def note(*arguments: Any) -> None:
            nonlocal most
            most = max(most, int(torch.cuda.max_memory_allocated(self.device)))
            reset(*arguments)

        reset(self.device)
        torch.cuda.reset_peak_memory_stats = note
        try:
            job()
        finally:
            torch.cuda.reset_peak_memory_stats = reset
        return max(most, int(torch.cuda.max_memory_allocated(self.device)))

    def waits(self, job: Callable[[], Any]) -> Waits | None:
        found: Waits = []

        def note(message: Any, *_: Any, **__: Any) -> None:
            if "synchroniz" in str(message):
                found.append(_asked())

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                job()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return found

    def kernels(self, job: Callable[[], Any]) -> int | None:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            job()
            self.synchronize()
        on_device = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


class FakeGpu(Gpu):
    """The fake CUDA device of `tests/fake_cuda`: shows who waits, what is launched and what memory is short of."""

    kind = "fake"

    def __init__(self, device: str, fake: Any) -> None:
        super().__init__(device)
        self._fake = fake

    @property
    def name(self) -> str:
        return "a fake CUDA device: memory and kernels are the CPU's"

    @contextmanager
    def limited(self, nbytes: int) -> Iterator[None]:
        with self._fake.limit(nbytes):
            yield

    def waits(self, job: Callable[[], Any]) -> Waits | None:
        with self._fake.device.watched() as waits:
            job()
        return [(wait.ours, " < ".join(wait.callers[:1])) for wait in waits if wait.callers]

    def kernels(self, job: Callable[[], Any]) -> int | None:
        before = self._fake.device.kernels.total()
        job()
        return self._fake.device.kernels.total() - before


@contextmanager
def machine(asked: str | None) -> Iterator[Machine]:
    """The device as asked; InvalidValueError says why there is none."""
    from vllm_omni.errors import InvalidValueError
    from vllm_omni.kernels.placement import device_for

    if asked == "fake":
        sys.path.insert(0, str(ROOT / "tests"))
        import fake_cuda

        with fake_cuda.installed():
            yield FakeGpu("cuda:0", fake_cuda)
        return
    device = device_for(asked)
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise InvalidValueError("device", asked, "is not there; `python -m vllm_omni.collect_env` says why")
        yield Gpu(device if ":" in device else f"{device}:{torch.cuda.current_device()}")
    elif device == "cpu":
        yield Machine(device)
    else:
        raise InvalidValueError("device", asked, "must be 'cuda', 'cuda:N', 'cpu' or 'fake'")


class Launches(TorchDispatchMode):
    """Counts the operations that a device would run as kernels: all but views and what only makes room."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = operation._schema.returns
        view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not view and not operation.__name__.startswith(("empty", "_local_scalar_dense", "detach", "new_empty")):
            self.count += 1
        return operation(*args, **(kwargs or {}))


def launches(job: Callable[[], Any]) -> int:
    """Kernels that a device would launch for a job, as the dispatcher says."""
    with Launches() as seen:
        job()
    return seen.count


def _asked() -> tuple[bool, str]:
    """Whose line asked: the innermost one of ours, or of a library that we run."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in LIBRARIES:
            _, mark, inside = frame.f_code.co_filename.rpartition(f"/{package}/")
            if mark:
                return package == LIBRARIES[0], f"{package}/{inside}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return False, "this script"
