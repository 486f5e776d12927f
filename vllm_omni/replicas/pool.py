"""Several engines behind the interface of one: a request goes where it delays everybody least, and dies with no engine.

All of it belongs to one event loop. `routing.py` decides where; here is what it decides about.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Self

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.interface import MAX_QUEUED_REQUESTS, EngineCondition, EngineStats, ModelInfo
from vllm_omni.engine.ledger import outcome
from vllm_omni.engine.supervisor import Launch
from vllm_omni.engine.wire import Action, LoadAdapter, Sleep, UnloadAdapter
from vllm_omni.errors import (
    ConflictError,
    EngineAsleepError,
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    InvalidValueError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    UnknownAdapterError,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas.control import PoolControl
from vllm_omni.replicas.line import Choice, Line
from vllm_omni.replicas.replica import Replica, ReplicaEngine
from vllm_omni.replicas.request import PoolRequest
from vllm_omni.replicas.routing import MOST_AGAIN, choose
from vllm_omni.replicas.stats import added_up, counters_of

logger = init_logger(__name__)


class ReplicaPool:
    """An `EngineClient` over several: `start` it (or `async with`), `generate`, `shutdown`.

    Of each engine `seqs` requests may run, and `waiting` may wait in all. One whose engine dies is asked again, with
    its seed and what is left of its time-out, at most twice, and never after a picture of it has gone out; it waits if
    no engine is there. `choice` is the rule by which a replica is chosen.
    """

    def __init__(self, engines: Sequence[ReplicaEngine], seqs: int, waiting: int, choice: Choice = choose) -> None:
        self.replicas = [Replica(str(index), engine) for index, engine in enumerate(engines)]
        self._seqs, self._waiting = seqs, waiting
        self._control = PoolControl(self.replicas)
        self._line = Line(self.replicas, self._control, seqs, choice)
        self._asked: dict[str, PoolRequest] = {}
        self._outcomes: Counter[str] = Counter()
        self._left_queued = 0  # that were aborted before an engine had them
        self._info: ModelInfo | None = None
        self._gone: list[EngineStats] = []  # what those that have left had counted
        self._draining = self._closed = False
        self._begun: list[Action] = []  # and not done yet: new requests are refused what is about to go
        self._news = asyncio.Event()  # set for a moment whenever something has ended
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Self:
        """Return once all have loaded their model; raises the first one's reason if one cannot."""
        await asyncio.gather(*(replica.engine.start() for replica in self.replicas))
        return self

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exception: object) -> None:
        await self.shutdown()

    @property
    def info(self) -> ModelInfo:
        if (engine := next((one.engine for one in self.replicas if one.engine.ready), None)) is not None:
            self._info = engine.info
        if self._info is None:
            raise EngineDeadError("no engine has loaded its model yet")
        return self._info

    @property
    def condition(self) -> EngineCondition:
        condition = self._control.condition
        there = {name: path for name, path in condition.adapters.items() if name not in self._leaving}
        return replace(condition, adapters=there)

    @property
    def ready(self) -> bool:
        return self._serves and not self._falls_asleep

    @property
    def _serves(self) -> bool:
        weights = self._control.weights
        return not (self._draining or self._closed) and any(one.able(weights) for one in self.replicas)

    async def generate(
        self,
        prompt: Any,
        sampling_params: OmniDiffusionSamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> AsyncIterator[OmniRequestOutput]:
        """See `EngineClient`; all errors named there come at the first step of the iterator."""
        request = PoolRequest(request_id, prompt, sampling_params, priority, timeout_s, salt)
        self._refuse(request)
        self._asked[request_id] = request
        ended = "aborted"  # unless the iterator is left no earlier than at its end
        try:
            async with aclosing(self._answers(request)) as outputs:
                async for output in outputs:
                    if output.finished:
                        ended = outcome(output.error)
                    yield output
        except OmniError as error:
            ended = outcome(error)
            raise
        finally:
            del self._asked[request_id]
            if not self._asked:
                self._line.calm()
            if request.accepted:
                self._outcomes[ended] += 1
                self._left_queued += ended == "aborted" and not request.taken
            self._tell()

    @property
    def waiting_s(self) -> float:
        """What the requests that no engine has yet would take, each with an engine to itself."""
        return self._line.seconds

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        for request_id in ids:
            if (request := self._asked.get(request_id) if isinstance(request_id, str) else None) is not None:
                request.settle(RequestAbortedError(f"request {request_id} was aborted"))
        aborts = (replica.engine.abort(ids) for replica in self.replicas)
        for error in await asyncio.gather(*aborts, return_exceptions=True):  # one that is lost keeps none from the rest
            if isinstance(error, BaseException) and not isinstance(error, OmniError):
                raise error

    async def control(self, action: Action) -> EngineCondition:
        """See `EngineClient` and `PoolControl`."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if isinstance(action, LoadAdapter):
            if action.name in self._leaving:
                raise ConflictError(f"adapter {action.name!r} is being unloaded, and requests still use it; try later")
            action = LoadAdapter(action.name, action.path, sorted(self._awaited().union(action.keep)))
        self._begun.append(action)
        try:
            while self._serves and self._comes_too_soon(action):
                await self._news.wait()
            return await self._control.do(action)
        finally:
            self._begun = [one for one in self._begun if one is not action]
            for replica in self.replicas:  # one may have started while the others did it
                if replica.engine.state in ("ready", "asleep"):
                    self.changed(replica.name)
            self._tell()

    def _comes_too_soon(self, action: Action) -> bool:
        """Whether it would end requests that wait here: the engines, once they have these, end them first."""
        if isinstance(action, UnloadAdapter):
            return action.name in self._awaited()
        return isinstance(action, Sleep) and len(self._line) > 0

    def _awaited(self) -> set[str]:
        """The adapters of requests that no engine has yet."""
        coming = [request for replica in self.replicas for request in replica.coming]
        return {name for request in [*self._line, *coming] for name in request.adapters}

    @property
    def _leaving(self) -> set[str]:
        return {action.name for action in self._begun if isinstance(action, UnloadAdapter)}

    @property
    def _falls_asleep(self) -> bool:
        return any(isinstance(action, Sleep) for action in self._begun)

    async def check_health(self) -> None:
        """Raise what the first replica says unless at least one answers."""
        checks = (replica.engine.check_health() for replica in self.replicas)
        answers = await asyncio.gather(*checks, return_exceptions=True)
        if None not in answers:
            raise next((one for one in answers if one is not None), EngineDeadError("no engine is there yet", 5.0))

    async def stats(self) -> EngineStats:
        every = [await replica.engine.stats() for replica in self.replicas]
        weights = self._control.weights
        told = [replica.told(stats, weights) for replica, stats in zip(self.replicas, every, strict=True)]
        total = added_up([*self._gone, *every], self._outcomes, told)
        waiting, seconds = total.waiting + len(self._line), total.queued_cost_s + self._line.seconds
        stages = dict(Counter(total.aborts_by_stage) + Counter(queued=self._left_queued))
        waited_s = total.queue_wait_s + self._line.waited_s
        return replace(total, waiting=waiting, queued_cost_s=seconds, queue_wait_s=waited_s, aborts_by_stage=stages)

    async def drain(self, timeout_s: float) -> None:
        """The engines take requests to the end: one whose engine dies meanwhile is still asked again."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._asked:
                    await self._news.wait()
        except TimeoutError:
            logger.warning("%d requests had not ended after %.1f s of draining", len(self._asked), timeout_s)

    async def shutdown(self) -> None:
        self._closed = True
        for request in self._line:
            request.settle(EngineClosedError(f"request {request.request_id} was aborted: the engine shuts down"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(replica.engine.shutdown() for replica in self.replicas))

    def join(self, name: str, engine: ReplicaEngine) -> None:
        """One more, which has started; it is asked as soon as it is like the others."""
        replica = Replica(name, engine)
        self._control.greet(replica)
        self.replicas.append(replica)
        self.changed(name)

    async def leave(self, name: str) -> None:
        """One that will not be asked any more; what it has, it may end, or it is asked of another one."""
        for replica in [one for one in self.replicas if one.name == name]:
            self.replicas.remove(replica)
            await replica.engine.shutdown()
            counted = counters_of(await replica.engine.stats())
            self._gone = [added_up([*self._gone, counted], {}, ())]

    def changed(self, name: str) -> None:
        """Note that the engine of a replica has started, or will not start any more."""
        for request in self._line:
            request.refused_by.discard(name)
        for replica in self.replicas:
            if replica.name == name and replica.missed:
                task = asyncio.create_task(self._catch_up(replica))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._tell()

    def freed(self) -> None:
        """Note that an engine may have a place: a request has ended there, also one that nobody waits for."""
        self._tell()

    async def _catch_up(self, replica: Replica) -> None:
        await self._control.catch_up(replica)
        self._tell()

    def _tell(self) -> None:
        """Something has ended, or an engine has changed: who waits may go."""
        self._line.move()
        self._news.set()
        self._news.clear()

    def _refuse(self, request: PoolRequest) -> None:
        """Refuse what no engine would be asked about."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._draining:
            raise EngineDrainingError("the engine is shutting down and takes no new requests")
        if self._falls_asleep:
            raise EngineAsleepError
        if request.request_id in self._asked:
            raise InvalidValueError("request_id", request.request_id, "must not be in use")
        if leaving := request.adapters & self._leaving:
            raise UnknownAdapterError("lora_request", ", ".join(sorted(leaving)), "must be loaded")
        if len(self._asked) >= self._seqs * max(1, len(self.replicas)) + self._waiting:
            raise QueueFullError(self._waiting, self._line.retry_after_s())

    async def _answers(self, request: PoolRequest) -> AsyncGenerator[OmniRequestOutput, None]:
        """The outputs of one replica after another, until one has ended it."""
        while True:
            try:
                replica = await self._line.place(request)
            except OmniError as error:
                if not request.accepted or isinstance(error, InvalidValueError):
                    raise
                yield OmniRequestOutput(request.request_id, request.prompt, error=error)
                return
            try:
                async with aclosing(self._ask(replica, request)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except (EngineAsleepError, InvalidValueError) as error:  # it has changed since it was last heard of
                if isinstance(error, InvalidValueError) and error.field != "lora_request":
                    raise
                request.taken -= 1
                request.refused_by.add(replica.name)
                if all(one.name in request.refused_by for one in self.replicas):
                    raise
                logger.info("replica %s does not take %s: %s", replica.name, request.request_id, error)
            except EngineDeadError as error:  # it died after it was chosen, and never had the request
                if replica.engine.ready or request.told or self._closed:
                    raise
                request.taken -= 1
                logger.info("replica %s died before it had %s: %s", replica.name, request.request_id, error)
            except _LostError as lost:
                replica.lost += 1
                again = f"{request.taken} of {MOST_AGAIN}"
                logger.warning("request %s is asked again (%s): %s", request.request_id, again, lost)
            finally:
                self._tell()

    async def _ask(self, replica: Replica, request: PoolRequest) -> AsyncGenerator[OmniRequestOutput, None]:
        """The outputs of one replica. _LostError if its engine died and another one is to be asked."""
        waited_s = request.waited_s
        stream = replica.engine.generate(
            request.prompt,
            request.params,
            request.request_id,
            priority=request.priority,
            timeout_s=request.left_s,
            salt=request.salt,
        )
        request.taken += 1
        del replica.coming[request]  # from the next line on, the engine itself counts it
        async with aclosing(stream) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if isinstance(output.error, EngineDeadError) and not self._closed:
                    if request.may_be_asked_again:
                        raise _LostError(str(output.error))
                    if request.taken > MOST_AGAIN:  # nobody is told to come back with it
                        output.error = EngineDeadError(f"{output.error}; {request.taken} engines ended with it")
                if output.finished:
                    replica.answered += 1
                    for times, name in ((output.stage_durations, "queue_s"), (output.metrics, "total_s")):
                        times[name] = times.get(name, 0.0) + waited_s
                if request.is_news(output):
                    request.told = request.told or bool(output.images)
                    yield output


class _LostError(Exception):
    """The engine that had a request has died."""


def local_pool(
    engine_args: dict[str, Any],
    size: int,
    *,
    max_queued_requests: int = MAX_QUEUED_REQUESTS,
    launches: Sequence[Launch] = (),
    choice: Choice = choose,
    **options: Any,
) -> ReplicaPool:
    """A pool of `size` engine processes on this machine, which take its devices in turn.

    `options` are those of `ProcessEngineClient`. Of all requests `max_queued_requests` may wait; each engine would take
    all of them, so that none is refused when it comes from one that died. `launches` have been made already.
    """
    pool: ReplicaPool | None = None

    def changed(index: int) -> None:
        if pool is not None:
            pool.changed(str(index))

    def freed() -> None:
        if pool is not None:  # a fault there must not end whoever says so
            asyncio.get_running_loop().call_soon(pool.freed)

    seqs = OmniDiffusionConfig(**engine_args).max_num_seqs
    engines = [
        ProcessEngineClient(
            engine_args,
            max_queued_requests=max_queued_requests + (size - 1) * seqs,
            launch=launches[index] if index < len(launches) else None,
            place=(index, size),
            changed=partial(changed, index),
            freed=freed,
            **options,
        )
        for index in range(size)
    ]
    pool = ReplicaPool(engines, seqs, max_queued_requests, choice)
    return pool
