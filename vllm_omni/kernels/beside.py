"""A module that runs beside a loop: on a device of its own, in a thread of its own. Knows no request and no pipeline.

The loop sends a call and takes its result back later. Whatever else is done with the module waits until no call of it
is under way, so that nobody finds it half-way through one.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm_omni.kernels.promise import mapped

_threads: WeakKeyDictionary[torch.nn.Module, ThreadPoolExecutor] = WeakKeyDictionary()  # several engines may share one


class Elsewhere:
    """Where a module is (`there`), and where its arguments come from and its results go to (`back`)."""

    def __init__(self, module: torch.nn.Module, there: torch.device, back: torch.device) -> None:
        self.module, self.there, self.back = module, there, back
        self.thread = _threads.setdefault(module, ThreadPoolExecutor(1, "vllm-omni-beside"))

    def quiet(self) -> None:
        """Wait until no call of the module is under way."""
        self.thread.submit(_nothing).result()

    def call(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the module or a method of it in this thread."""
        self.quiet()
        return self.moved(act, *args, **kwargs)

    def moved(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`act` with its arguments `there`, and its result `back`."""
        args, kwargs = placed((args, kwargs), self.there)
        return placed(act(*args, **kwargs), self.back)

    def seen(self, name: str, value: Any) -> Any:
        """An attribute of the module as a caller who works at `back` may use it."""
        if name == "device":
            return self.back
        if isinstance(value, torch.nn.Module):
            return _Inner(self, value)
        if name in ("to", "cpu", "cuda"):
            return self.cast
        if inspect.ismethod(value):
            return partial(self.call, value)
        return value.to(self.back) if isinstance(value, torch.Tensor) else value

    def cast(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The module's `to`, but for the device: it stays where it is."""
        self.quiet()
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        return self.module.to(*dtypes) if dtypes else self.module


class _Inner:
    """A module inside one that is elsewhere."""

    def __init__(self, where: Elsewhere, module: torch.nn.Module) -> None:
        self._where, self._module = where, module

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._where.call(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._where.seen(name, getattr(self._module, name))


class Beside:
    """One loop's calls of modules that are elsewhere. For the thread of the loop alone."""

    def __init__(self) -> None:
        self._sent: dict[Future[Any], tuple[Callable[[Any, float], None], list[float]]] = {}

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def since(self) -> float:
        """When the longest of those that run began, in seconds of `time.monotonic`; now if none runs."""
        return min((began[0] for _, began in self._sent.values() if began), default=time.monotonic())

    def send(self, part: Elsewhere, act: Callable[[], Any], take: Callable[[Any, float], None]) -> None:
        """Make a call of the module, by `part.moved`; `take` gets its result, None if it failed, and its seconds."""
        began: list[float] = []

        def run() -> tuple[Any, float]:
            began.append(time.monotonic())
            with torch.inference_mode():
                result = act()
            if part.there.type == "cuda":
                torch.cuda.synchronize(part.there)
            return result, time.monotonic() - began[0]

        self._sent[part.thread.submit(run)] = take, began

    def take(self, wait_s: float = 0.0) -> None:
        """Hand out the results that are there; if there is none, wait for one as long as `wait_s` seconds."""
        for future in wait(self._sent, wait_s, FIRST_COMPLETED).done if self._sent else ():
            take, _ = self._sent.pop(future)
            take(*(future.result() if future.exception() is None else (None, 0.0)))


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


def _nothing() -> None:
    """Has been done when everything before it has."""
