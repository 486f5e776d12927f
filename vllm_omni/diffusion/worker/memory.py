"""A batch that the device has no room for: residuals go first, then it is split, and what helped is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any
from weakref import WeakSet

import torch

from vllm_omni.diffusion.cache.calibration import RecordingState
from vllm_omni.diffusion.cache.forward import is_of_output
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker.coroutine import DenoiserCall
from vllm_omni.diffusion.worker.request import Request
from vllm_omni.kernels.device import Memory, is_out_of_memory, tried
from vllm_omni.kernels.room import Limits, Room, Work
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
Act = Callable[[Sequence[Request]], list[Any]]


class Retries:
    """Runs what may fail for a batch, and finds for each request its own result."""

    def __init__(self, memory: Memory, room: Room, by_clock: bool = True) -> None:
        """`by_clock`: what was measured may decide; it must not where several ranks decide alike."""
        self.memory, self.room, self.by_clock = memory, room, by_clock
        self.running: WeakSet[Request] = WeakSet()  # and some that have ended, which hold no more than their pictures
        self._most = Limits(rise=by_clock)  # requests of a size at once
        self._cached = Limits(rise=by_clock)  # requests with a cache; 0: not one has room
        self._apart = Limits(rise=by_clock)  # requests of which several calls are made as one

    def at_once(self, batch: Sequence[Request]) -> int:
        """How many of a batch there is room and time for in one turn; one at least."""
        work, count = work_of(batch[0]), len(batch)
        if self._apart.bars(work):
            for request in batch:
                request.take_apart()
            work = work_of(batch[0])
        count = min(count, self._most.most(work) or count, self.room.at_once(work) or count)
        return self.room.pays(work, count) if self.by_clock and work.kind is StepKind.COMPUTE else count

    def each_or_errors(self, batch: Sequence[Request], act: Act) -> list[Any]:
        """Each request's result, or the exception its own call raises: a joint failure is looked for one by one.

        There are fewer results than requests if memory has run out: the last ones must wait for another turn.
        `act` changes a request's state after everything that can fail, so that a retry starts from untouched state.
        DeviceLostError if there is nothing left to retry on.
        """
        joined = [request for request in batch if request.parked is not None and request.parked.earlier]
        work = work_of(batch[0])
        if self._cached.bars(work):
            for request in batch:
                self._drop_own([request])
            work = work_of(batch[0])
        results, failure = self._measured(batch, work, act)
        if failure is None:
            self._most.held(work, len(batch))
            if self.by_clock:
                self.room.went_well()
        if failure is not None and joined and (len(batch) == 1 or is_out_of_memory(failure)):
            if is_out_of_memory(failure):
                self._apart.lower(work, 0)
            for request in joined:
                request.take_apart()
            return self.each_or_errors(batch[: self.at_once(batch)], act)
        for make_room in (self._drop_others, self._drop_own):
            if failure is None or not is_out_of_memory(failure):
                break
            work, dropped, kept = work_of(batch[0]), make_room(batch), self.room.kept
            if dropped or self.memory.collect():
                self.memory.begin()
                results, failure = self._measured(batch, work_of(batch[0]), act)
            if failure is not None or batch[0].plan_of is not None:  # what a trial takes is nobody's need
                continue
            if work != work_of(batch[0]):
                self._cached.lower(work, 0)
                logger.warning("%s has no room for such a request with a cache; for now without", self.memory)
            elif dropped:  # residuals were the reason: for now no more than what was left
                self.room.keep_less(kept + min(dropped // 2, self.memory.spare()))
        if failure is None:
            return results or []
        if is_out_of_memory(failure):
            work = work_of(batch[0])
            if len(batch) == 1:
                return [self.memory.too_large(failure, work.coding, work.elements, self.room.largest)]
            self._most.lower(work, half := (len(batch) + 1) // 2)
            logger.warning("%s has no room for %d such requests at once; for now %d", self.memory, len(batch), half)
            return self.each_or_errors(batch[:half], act)
        if len(batch) == 1:
            return [failure]
        return [self.each_or_errors([request], act)[0] for request in batch]

    def _measured(self, batch: Sequence[Request], work: Work, act: Act) -> tuple[list[Any] | None, Exception | None]:
        """`tried`, with an account of the bytes that this took if that is not known yet."""
        if batch[0].plan_of is not None or not self.room.unknown(work, len(batch)):
            return tried(partial(act, batch))
        before = self.memory.begin()
        results, failure = tried(partial(act, batch))
        if failure is None:
            took = self.memory.most() - before
            self.room.took(work, len(batch), took, work.kind is StepKind.COMPUTE, beside=before - self.room.kept)
        return results, failure

    def _drop_others(self, batch: Sequence[Request]) -> int:
        """Drop what others keep for later steps, which then compute; returns the bytes."""
        before = self.room.kept
        for other in self.running:
            used_next = other.parked is not None and other.parked.forecast is not None
            if not used_next and not any(other is request for request in batch):
                other.cache.drop()
        return before - self.room.kept

    def _drop_own(self, batch: Sequence[Request]) -> int:
        """Let a request that is alone go on without a cache; returns the bytes, one if there was a cache at all."""
        request = batch[0]
        if len(batch) > 1 or request.backend is None:
            return 0
        before = self.room.kept
        request.cache.drop()
        dropped = before - self.room.kept
        request.backend = None
        if request.parked is not None and request.parked.forecast is not None:
            earlier = tuple(call._replace(kind=StepKind.COMPUTE, forecast=None) for call in request.parked.earlier)
            request.parked = request.parked._replace(kind=StepKind.COMPUTE, forecast=None, earlier=earlier)
        return dropped or 1


def work_of(request: Request) -> Work:
    """By which a batch's need is remembered."""
    parked = request.parked
    kind = None if parked is None else parked.kind
    if parked is None or isinstance(parked.call, DenoiserCall):
        shapes = request.size[1] if isinstance(request.size, tuple) else ()
        calls = 1 if parked is None else len(parked.here)
        cached = request.backend is not None and (1, isinstance(request.cache, RecordingState))  # it takes more
        size = request.size, cached, calls, parked is not None and is_of_output(parked.forecast)
        return Work(kind, size, calls * sum(prod(shape) for shape in shapes))
    given = (*parked.call.args, *parked.call.kwargs.values())
    shapes = [value.shape for value in given if isinstance(value, torch.Tensor)]
    own = isinstance(parked.key, tuple) and parked.key[0] == request.request_id  # it shares no call
    work = Work((kind, parked.call.component), parked.key, sum(map(prod, shapes)))
    return work._replace(size=tuple(shapes)) if own else work
