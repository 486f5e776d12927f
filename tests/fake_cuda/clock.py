"""Time on a device that runs behind its host: kernels are queued, and the host waits only where it must."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")


class Clock:
    """Off by default: kernels then take no time of their own.

    `flops` and `bandwidth` (bytes) are per second, `launch_s` is what every kernel takes at least, and `queue` is how
    many kernels the host may be ahead of the device.
    """

    def __init__(self) -> None:
        self.running = False
        self.flops, self.bandwidth, self.launch_s, self.queue = 1e12, 1e11, 3e-6, 1024
        self.busy_s = 0.0  # the truth: what the device has worked
        self._done_at = 0.0
        self._queued: deque[float] = deque()

    @contextmanager
    def at(self, **rates: Any) -> Iterator[Clock]:
        """Within, the device takes its own time."""
        before = dict(vars(self))
        vars(self).update(rates, running=True, busy_s=0.0)
        try:
            yield self
        finally:
            self.wait()
            vars(self).update(before)

    def launch(self, kernel: str, arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> None:
        """Queue a kernel; a full queue holds the host."""
        if not self.running:
            return
        seconds, now = self.launch_s + self._work(kernel, arguments, results), time.perf_counter()
        self._done_at = max(now, self._done_at) + seconds
        self.busy_s += seconds
        self._queued.append(self._done_at)
        while self._queued[0] <= now:
            self._queued.popleft()
            if not self._queued:
                return
        if (over := len(self._queued) - self.queue) > 0:
            _sleep_until(self._queued[over - 1])

    def wait(self) -> None:
        """Hold the host until the device has done everything."""
        _sleep_until(self._done_at if self.running else 0.0)

    @property
    def idle(self) -> bool:
        return not self.running or time.perf_counter() >= self._done_at

    @property
    def reaches(self) -> float:
        """When the device will be here: what an event that is recorded now will say."""
        return max(time.perf_counter(), self._done_at) if self.running else time.perf_counter()

    def _work(self, kernel: str, arguments: Sequence[Any], results: Sequence[torch.Tensor]) -> float:
        read = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        operations = 0.0
        if kernel in PRODUCTS and results:
            inner = read[-2].shape[-1] if len(read) > 1 else 1
            operations = 2.0 * results[0].numel() * inner
        elif "dot_product" in kernel and len(read) > 1:
            operations = 4.0 * read[0].numel() * read[1].shape[-2]
        elif "convolution" in kernel and len(read) > 1 and results:
            operations = 2.0 * results[0].numel() * (read[1].numel() / max(1, len(read[1])))
        return operations / self.flops + sum(tensor.nbytes for tensor in (*read, *results)) / self.bandwidth


EVENT_S = 5e-6  # until the host sees of an event that the device has passed it


class Event:
    """`torch.cuda.Event` on that clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._at = clock, None

    def record(self, stream: Any = None) -> None:
        self._at = self._clock.reaches

    def query(self) -> bool:
        return self._at is None or not self._clock.running or time.perf_counter() >= self._at + EVENT_S

    def synchronize(self) -> None:
        if self._clock.running:
            _sleep_until(self._at or 0.0)

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        if self._at is None or end._at is None:
            raise ValueError("both events must be recorded")
        return (end._at - self._at) * 1e3


def _sleep_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)
