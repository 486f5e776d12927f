"""A module that runs beside a loop: on a device of its own, in a thread of its own. Knows no request and no pipeline.

The loop starts a call and takes its result back later; one call of a module runs at a time. Calls are started by the
loop's thread alone, so that whatever else this thread does with the module finds it quiet once the call that runs has
ended.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm_omni.kernels.device import current
from vllm_omni.kernels.promise import kept, mapped


class _Lane:
    """The one thread in which a module's calls run, whichever engine makes them."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "vllm-omni-beside")
        self.running: Future[Any] | None = None


_lanes: WeakKeyDictionary[torch.nn.Module, _Lane] = WeakKeyDictionary()


class Elsewhere:
    """Where a module is (`there`), and where its arguments come from and its results go to (`back`)."""

    def __init__(self, module: torch.nn.Module, there: torch.device, back: torch.device) -> None:
        self.module, self.there, self.back = module, there, back
        self.lane = _lanes.setdefault(module, _Lane())

    def quiet(self) -> None:
        """Wait until the call of the module that runs has ended."""
        if self.lane.running is not None:
            wait([self.lane.running])

    def call(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the module or a method of it in this thread."""
        args, kwargs = kept((args, kwargs))
        self.quiet()
        return self.moved(act, *args, **kwargs)

    def moved(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`act` with its arguments `there`, and its result `back`.

        A copy from one GPU to another makes each wait for the other, so the result is made before it is copied.
        """
        args, kwargs = placed((args, kwargs), self.there)
        result = act(*args, **kwargs)
        if self.there.type == "cuda":
            torch.cuda.current_stream(self.there).synchronize()
        return self.seen(placed(result, self.back))

    def seen(self, value: Any) -> Any:
        """A result or an attribute as a caller who works at `back` may use it."""
        return _Inner(self, value) if isinstance(value, torch.nn.Module) else value

    def attribute(self, module: torch.nn.Module, name: str) -> Any:
        """An attribute of the module, or of one inside it."""
        if name == "device":
            return self.back
        value = getattr(module, name)
        if name in ("to", "cpu", "cuda"):
            return partial(self.cast, module)
        if inspect.ismethod(value):
            return functools.update_wrapper(partial(self.call, value), value)  # some look at the signature
        return value.to(self.back) if isinstance(value, torch.Tensor) else self.seen(value)

    def cast(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The module's `to`, but for the device: it stays where it is."""
        self.quiet()
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        return module.to(dtypes[0]) if dtypes else module


class _Inner:
    """A module inside one that is elsewhere."""

    def __init__(self, where: Elsewhere, module: Any) -> None:
        self._where, self._module = where, module

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._where.call(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._where.attribute(self._module, name)

    def __getitem__(self, index: Any) -> Any:
        return self._where.seen(self._module[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._where.seen, self._module)

    def __len__(self) -> int:
        return len(self._module)


Take = Callable[[Any, float], None]


class Beside:
    """One loop's calls of modules that are elsewhere. For the thread of the loop alone."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Elsewhere, Callable[[], Any], Take]] = deque()
        self._started: dict[Future[Any], tuple[Take, list[float]]] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._started)

    @property
    def since(self) -> float:
        """When the longest of those that run began, in seconds of `time.monotonic`; now if none runs."""
        began = [began[0] for future, (_, began) in self._started.items() if began and not future.done()]
        return min(began, default=time.monotonic())

    def send(self, part: Elsewhere, act: Callable[[], Any], take: Take) -> None:
        """Make a call of the module, by `part.moved`; `take` gets what it returns, and its seconds."""
        self._waiting.append((part, act, take))
        self._start()

    def wait(self, seconds: float) -> None:
        """Until one has ended, but no longer than `seconds`; for nothing if none runs."""
        others = [part.lane.running for part, _, _ in self._waiting if part.lane.running is not None]
        if self._started or others:
            wait([*self._started, *others], seconds, FIRST_COMPLETED)

    def take(self) -> None:
        """Hand out the results that are there, and start what waited for that."""
        for future in [future for future in self._started if future.done()]:
            take, _ = self._started.pop(future)
            take(*future.result())
        self._start()

    def _start(self) -> None:
        for entry in list(self._waiting):
            part, act, take = entry
            if part.lane.running is None or part.lane.running.done():
                self._waiting.remove(entry)
                began: list[float] = []
                part.lane.running = future = part.lane.thread.submit(_run, part, act, began)
                self._started[future] = take, began


def _run(part: Elsewhere, act: Callable[[], Any], began: list[float]) -> tuple[Any, float]:
    began.append(time.monotonic())
    with torch.inference_mode(), current(part.there):
        result = act()
    return result, time.monotonic() - began[0]


def placed(value: Any, device: torch.device) -> Any:
    """An argument or a result with its tensors on `device`, also those of a small object such as a distribution."""
    return mapped(partial(_placed, device), value)


def _placed(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    tensors = {name: own for name, own in getattr(value, "__dict__", {}).items() if isinstance(own, torch.Tensor)}
    if not tensors or isinstance(value, torch.nn.Module):
        return value
    moved = copy.copy(value)
    vars(moved).update({name: own.to(device) for name, own in tensors.items()})
    return moved
