"""Requests that an engine has and that have not ended, and who waits for each. Knows no engine and no socket."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from typing import Any

from vllm_omni.engine.interface import EngineCondition
from vllm_omni.engine.ledger import RequestSize
from vllm_omni.engine.wire import Action, Control, Controlled, EngineEvent, Outputs, Refused, Sleep
from vllm_omni.errors import EngineDeadError, InvalidValueError, OmniError
from vllm_omni.outputs import OmniRequestOutput

MAX_ID_CHARACTERS = 256
OutputOrError = OmniRequestOutput | Exception  # what a request yields; an exception is raised where it is waited for
Item = OutputOrError | EngineCondition


class InFlightRequest:
    """One request, and the event loop that waits for it. `engine_id` is the engine's name for it."""

    def __init__(self, request_id: str, engine_id: str, prompt: Any) -> None:
        self.request_id, self.engine_id, self.prompt = request_id, engine_id, prompt
        self.size = RequestSize(0, 0)
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()

    def put(self, item: Item) -> None:
        """Hand over an item, from any thread."""
        if threading.get_ident() == self._thread:
            self.items.put_nowait(item)
            return
        with suppress(RuntimeError):  # the event loop has been closed: nobody waits
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)


class InFlight:
    """All requests of one engine, from any thread. Each ends exactly once, and only its own end, abort or id touch it.

    A request that nobody waits for any more stays until the engine has ended it; its id is free for another at once,
    which the engine then knows by another name.
    """

    def __init__(
        self, abort: Callable[[list[str]], None], backlog: int, ended: Callable[[OutputOrError], None] | None = None
    ) -> None:
        """`abort` asks the engine to end requests, by its own names; `ended` is called with the last item of each.

        A listener that has not taken `backlog` items gets no further progress reports before it does, but all pictures.
        """
        self._abort, self._backlog, self._ended = abort, backlog, ended
        self._requests: dict[str, InFlightRequest] = {}  # by the engine's name
        self._awaited: dict[str, InFlightRequest] = {}  # by the name its owner gave it
        self._controls: dict[str, tuple[Action, InFlightRequest]] = {}  # that the engine has not answered
        self._control_ids = count()
        self._over: OmniError | None = None
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._requests))

    @property
    def ids(self) -> list[str]:
        """The names of all that somebody waits for."""
        return list(self._awaited)

    @property
    def sizes(self) -> list[RequestSize]:
        """The size of every request, oldest first."""
        return [request.size for request in list(self._requests.values())]

    @property
    def named_sizes(self) -> dict[str, RequestSize]:
        """The same by the engine's names."""
        return {name: request.size for name, request in list(self._requests.items())}

    @property
    def fall_asleep(self) -> bool:
        """Whether the engine ends them before it does a `Sleep`, and takes no more."""
        return any(isinstance(action, Sleep) for action, _ in list(self._controls.values()))

    async def stream(
        self, request_id: str, prompt: Any, begin: Callable[[InFlightRequest], None]
    ) -> AsyncGenerator[OmniRequestOutput, None]:
        """The outputs of a new request, the finished one last; leaving the iterator aborts it.

        `begin` hands it to the engine, or raises.
        """
        refuse_after_fork(self._pid)
        with self._lock:
            request = self._add(request_id, prompt)
            with ExitStack() as undo:
                undo.callback(self._forget, request)
                begin(request)
                undo.pop_all()
        try:
            while True:
                item = await request.items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            with self._lock:
                if self._requests.get(request.engine_id) is request:
                    self._leave(request)
                    self._abort([request.engine_id])

    async def control(self, action: Action, send: Callable[[Control], None]) -> EngineCondition:
        """The engine's condition after `action`; raises why it was not done."""
        refuse_after_fork(self._pid)
        with self._lock:
            if self._over is not None:
                raise copy.copy(self._over)
            control_id = str(next(self._control_ids))
            waiter = InFlightRequest("", control_id, None)
            with ExitStack() as undo:
                self._controls[control_id] = action, waiter
                undo.callback(self._controls.pop, control_id, None)
                send(Control(control_id, action))
                undo.pop_all()
        item = await waiter.items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests within one step; unknown ids are ignored."""
        refuse_after_fork(self._pid)
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        for request_id in ids:
            if not isinstance(request_id, str):
                raise InvalidValueError("request_ids", request_id, "must be an id, or several")
        with self._lock:
            if known := [self._awaited[i].engine_id for i in ids if i in self._awaited]:
                self._abort(known)

    def note(self, event: EngineEvent) -> None:
        """Hand outputs and refusals to those who wait for them."""
        if isinstance(event, Refused):
            self._end(event.request_id, event.error)
        elif isinstance(event, Controlled):
            if (done := self._controls.pop(event.control_id, None)) is not None:
                done[1].put(event.error or event.condition)
        elif isinstance(event, Outputs):
            for output in event.outputs:
                if output.finished:
                    self._end(output.request_id, output)
                elif (request := self._requests.get(output.request_id)) is not None and (
                    output.images or request.items.qsize() < self._backlog
                ):
                    self._put(request, output)

    def end_all(self, item_of: Callable[[str], OutputOrError], over: OmniError | None = None) -> None:
        """End every request; with `over`, every later one is refused with it."""
        with self._lock:
            self._over = over
            for request in list(self._requests.values()):
                self._end(request.engine_id, item_of(request.request_id))
            while self._controls:
                _, (_, waiter) = self._controls.popitem()
                item = item_of("")
                waiter.put(item if isinstance(item, Exception) else item.error or EngineDeadError("the engine ended"))

    def _add(self, request_id: str, prompt: Any) -> InFlightRequest:
        if self._over is not None:
            raise copy.copy(self._over)
        if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_CHARACTERS:
            raise InvalidValueError("request_id", request_id, f"must be a text of 1 to {MAX_ID_CHARACTERS} characters")
        if not request_id.isprintable():
            raise InvalidValueError("request_id", request_id, "must hold printable characters only")
        if request_id in self._awaited:
            raise InvalidValueError("request_id", request_id, "must not be in use")
        names = (f"{request_id}~{n}" if n else request_id for n in count())
        engine_id = next(name for name in names if name not in self._requests)
        request = InFlightRequest(request_id, engine_id, prompt)
        self._requests[engine_id] = self._awaited[request_id] = request
        return request

    def _end(self, engine_id: str, item: OutputOrError) -> None:
        """The one place where a request ends."""
        with self._lock:
            if (request := self._requests.get(engine_id)) is None:
                return
            self._forget(request)
        self._put(request, item)
        if self._ended is not None:
            self._ended(item)

    def _forget(self, request: InFlightRequest) -> None:
        del self._requests[request.engine_id]
        self._leave(request)

    def _leave(self, request: InFlightRequest) -> None:
        """Nobody waits for it any more."""
        if self._awaited.get(request.request_id) is request:
            del self._awaited[request.request_id]

    @staticmethod
    def _put(request: InFlightRequest, item: OutputOrError) -> None:
        if isinstance(item, OmniRequestOutput):
            item.request_id, item.prompt = request.request_id, request.prompt
        request.put(item)


def refuse_after_fork(pid: int) -> None:
    """Raise EngineDeadError in a process forked from `pid`, where the engine was made: its threads are not here."""
    if os.getpid() != pid:
        raise EngineDeadError(
            f"the engine belongs to process {pid}, from which this one was forked without its threads; "
            "make an engine in this process, or start the process with multiprocessing's 'spawn'"
        )
