"""Asynchronous generation: the engine's loop in a thread; requests join and leave its batch at any step."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import Any, Self
from uuid import uuid4

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.engine.in_flight import InFlight, InFlightRequest
from vllm_omni.engine.interface import EngineCondition
from vllm_omni.engine.loop import EngineLoop
from vllm_omni.engine.wire import Abort, Action, Add, Close, Command, Sleep, Wake, given_parameters
from vllm_omni.entrypoints.omni import engine_over
from vllm_omni.errors import EngineClosedError, EngineDeadError, OmniError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt, own
from vllm_omni.outputs import OmniRequestOutput

_EVERY_REPORT = 10**6


class AsyncOmni:
    """`async for output in AsyncOmni("demo").generate("red apple"): ...`; the last output is finished.

    Any thread and any event loop may call it.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._open(DiffusionEngine(OmniDiffusionConfig(model=model, **engine_args)))

    @classmethod
    def from_pipe(cls, pipe: Any, *, defaults: dict[str, Any] | None = None, **engine_args: Any) -> Self:
        """An engine over a diffusers pipeline that is loaded already."""
        omni = cls.__new__(cls)
        omni._open(engine_over(pipe, defaults, engine_args))
        return omni

    def _open(self, engine: DiffusionEngine) -> None:
        self.engine = engine
        self._pid = os.getpid()
        self._commands = commands = queue.SimpleQueue[Command]()
        self._requests = InFlight(lambda engine_ids: commands.put(Abort(engine_ids)), _EVERY_REPORT)
        self._loop = loop = EngineLoop(engine, commands, self._requests.note, progress_every_s=0.0)
        self._thread = threading.Thread(
            target=_drive, args=(loop, self._requests), name="vllm-omni-engine", daemon=True
        )
        self._close = weakref.finalize(self, commands.put, Close())  # once, whether asked to or forgotten
        self._close.atexit = False
        self._thread.start()

    def generate(
        self,
        prompt: Any,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[OmniRequestOutput]:
        """Progress after each step (with images every `preview_every` steps), then the finished output or its `.error`.

        A request that is refused raises, and EngineDeadError does if the engine fails. Leaving the iterator, or
        cancelling its task, aborts the request within one step.
        """

        def begin(request: InFlightRequest) -> None:
            if not self._close.alive:
                raise EngineClosedError("the engine is closed")
            normalise_prompt(prompt)
            given = given_parameters(sampling_params or OmniDiffusionSamplingParams())
            self._commands.put(Add(request.engine_id, own(prompt), own(given), 0, time.monotonic(), None))

        return self._requests.stream(uuid4().hex if request_id is None else request_id, prompt, begin)

    async def control(self, action: Action) -> EngineCondition:
        """Have an action of `engine/wire.py` done between two steps; returns the condition after it."""
        if not self._close.alive:
            raise EngineClosedError("the engine is closed")
        return await self._requests.control(action, self._commands.put)

    async def sleep(self, level: int = 1) -> None:
        """Give back the device's memory once all requests have ended; see `Omni.sleep`."""
        await self.control(Sleep(level))

    async def wake_up(self) -> None:
        """End the sleep."""
        await self.control(Wake())

    async def is_sleeping(self) -> bool:
        return self._loop.control.condition.asleep > 0

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests within one step; their iterators return an output whose error says so."""
        self._requests.abort(request_ids)

    def close(self) -> None:
        """Abort what runs and stop the thread."""
        if os.getpid() == self._pid:
            self._close()
            self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)


def _drive(loop: EngineLoop, requests: InFlight) -> None:
    """Run the loop. Whatever ends it, every request ends with it, and every later one is refused."""
    over: OmniError = EngineClosedError("the engine is closed")
    try:
        loop.run()
    finally:  # an exception goes on, to be shown by `threading.excepthook`
        if (error := sys.exception()) is None:
            requests.end_all(_closed, over)
        else:
            over = EngineDeadError(f"the engine failed ({type(error).__name__}: {error}); make a new one")
            requests.end_all(lambda _: EngineDeadError(str(over)), over)
            loop.engine.close()


def _closed(request_id: str) -> OmniRequestOutput:
    return OmniRequestOutput(
        request_id, error=RequestAbortedError(f"request {request_id} was aborted: the engine closed")
    )
