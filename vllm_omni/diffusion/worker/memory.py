"""A batch that the device has no room for: residuals go first, then it is split, and what helped is remembered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker.coroutine import DenoiserCall
from vllm_omni.diffusion.worker.request import Request
from vllm_omni.kernels.device import Memory, is_out_of_memory, refuse_lost, without_tensors
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
Act = Callable[[Sequence[Request]], list[Any]]


class Retries:
    """Runs what may fail for a batch, and finds for each request its own result."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.running: list[Request] = []
        self._most: dict[Hashable, int] = {}  # requests of a size at once, where more had no room
        self._apart: set[Hashable] = set()  # sizes of which no two calls of a request are made as one
        self._largest = 0  # elements of the latents that have been denoised here

    def add(self, request: Request) -> None:
        """Take in a request, and forget those that have ended."""
        self.running = [*(other for other in self.running if other.ended is None), request]

    def each_or_errors(self, batch: Sequence[Request], act: Act) -> list[Any]:
        """Each request's result, or the exception its own call raises: a joint failure is looked for one by one.

        `act` changes a request's state after everything that can fail, so that a retry starts from untouched state.
        DeviceLostError if there is nothing left to retry on.
        """
        most = max(1, self._most.get(_size(batch[0]), len(batch)))
        if len(batch) > most:
            parts = [batch[first : first + most] for first in range(0, len(batch), most)]
            return [result for part in parts for result in self.each_or_errors(part, act)]
        joined = [request for request in batch if request.parked is not None and request.parked.earlier]
        if joined and _size(batch[0]) in self._apart:
            _take_apart(joined)
        results, failure = tried(batch, act)
        if failure is not None and joined and (len(batch) == 1 or is_out_of_memory(failure)):
            if is_out_of_memory(failure):
                self._apart.add(_size(batch[0]))
            _take_apart(joined)
            return self.each_or_errors(batch, act)
        if failure is not None and is_out_of_memory(failure):
            kept, freed = self._drop_residuals(batch), self.memory.collect()
            if kept or freed:
                results, failure = tried(batch, act)
            if kept and failure is None:  # residuals were the reason: from now on there are fewer
                self._keep_less(batch[0], kept)
        if failure is None:
            self._largest = max(self._largest, _elements(batch[0]))
            return results
        if is_out_of_memory(failure):
            if len(batch) == 1:
                decoding, wanted = not isinstance(batch[0].call, DenoiserCall), _elements(batch[0])
                return [self.memory.too_large(failure, decoding, wanted, self._largest)]
            self._most[_size(batch[0])] = half = (len(batch) + 1) // 2
            logger.warning("%s has no room for %d such requests at once; from now on %d", self.memory, len(batch), half)
            return self.each_or_errors(batch, act)
        if len(batch) == 1:
            return [failure]
        return [self.each_or_errors([request], act)[0] for request in batch]

    def _drop_residuals(self, batch: Sequence[Request]) -> int:
        """Drop what others keep for later steps, which then compute; one alone drops its own too. Returns the bytes."""
        stores = {id(r.backend.store): r.backend.store for r in self.running if r.backend is not None}
        before = sum(store.used for store in stores.values())
        for other in self.running:
            used_next = other.parked is not None and other.parked.forecast is not None
            if not used_next and not any(other is request for request in batch):
                other.cache.drop()
        if before == sum(store.used for store in stores.values()) and len(batch) == 1:
            request = batch[0]
            request.cache.drop()
            request.backend = None
            if request.parked is not None and request.parked.forecast is not None:
                request.parked = replace(request.parked, kind=StepKind.COMPUTE, forecast=None)
        return before - sum(store.used for store in stores.values())

    def _keep_less(self, request: Request, kept: int) -> None:
        if request.backend is not None:
            store = request.backend.store
            store.budget = min(kept // 2, store.budget if store.budget is not None else kept)
            logger.warning("%s: residuals are kept in %d MiB from now on", self.memory, store.budget >> 20)


def tried(batch: Sequence[Request], act: Act) -> tuple[list[Any], Exception | None]:
    """The results, or what was raised; DeviceLostError if the device is lost."""
    try:
        return act(batch), None
    except Exception as error:  # out of memory or a bad input of one must not end the others
        refuse_lost(error)
        return [], without_tensors(error)


def _take_apart(requests: Sequence[Request]) -> None:
    for request in requests:
        request.take_apart()


def _size(request: Request) -> Hashable:
    """By which a batch's need is remembered."""
    parked = request.parked
    kind = None if parked is None else parked.kind
    if parked is None or isinstance(parked.call, DenoiserCall):
        return kind, request.size
    return kind, parked.key


def _elements(request: Request) -> int:
    shapes = request.size[1] if isinstance(request.size, tuple) else ()
    return sum(prod(shape) for shape in shapes)
