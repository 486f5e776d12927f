"""Asynchronous generation: the engine's loop in a thread; requests join and leave its batch at any step."""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.distributed.lockstep import open_engine
from vllm_omni.engine.describe import describe
from vllm_omni.engine.in_flight import InFlight, InFlightRequest
from vllm_omni.engine.interface import EngineCondition
from vllm_omni.engine.learning import IdleLearning
from vllm_omni.engine.loop import EngineLoop
from vllm_omni.engine.wire import (
    Abort,
    Action,
    Add,
    Close,
    Command,
    LoadAdapter,
    Sleep,
    UnloadAdapter,
    Wake,
    given_parameters,
)
from vllm_omni.entrypoints.omni import engine_over
from vllm_omni.errors import EngineClosedError, EngineDeadError, InvalidValueError, OmniError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt, own
from vllm_omni.outputs import OmniRequestOutput

_EVERY_REPORT = 10**6
_LOOK_AGAIN_S = 0.02  # while generation is paused


class AsyncOmni:
    """`async for output in AsyncOmni("demo").generate("red apple"): ...`; the last output is finished.

    Any thread and any event loop may call it.
    """

    def __init__(self, model: str | Path, **engine_args: Any) -> None:
        self._open(open_engine(OmniDiffusionConfig(model=model, **engine_args)))

    @classmethod
    def from_pipe(cls, pipe: Any, *, defaults: dict[str, Any] | None = None, **engine_args: Any) -> Self:
        """An engine over a diffusers pipeline that is loaded already."""
        omni = cls.__new__(cls)
        omni._open(engine_over(pipe, defaults, engine_args))
        return omni

    def _open(self, engine: DiffusionEngine) -> None:
        self.engine = engine
        self._pid, self._paused = os.getpid(), threading.Event()
        taken = inspect.signature(type(engine.worker.pipeline).__call__).parameters
        self._makes = "video" if "num_frames" in taken else "image"
        self._commands = commands = queue.SimpleQueue[Command]()
        self._requests = InFlight(lambda engine_ids: commands.put(Abort(engine_ids)), _EVERY_REPORT)
        self._loop = loop = EngineLoop(engine, commands, self._requests.note, progress_every_s=0.0)
        if engine.config.parallel_config.ranks == 1:
            loop.learning = IdleLearning(engine, describe(engine, {}))
        self._thread = threading.Thread(
            target=_drive, args=(loop, self._requests), name="vllm-omni-engine", daemon=True
        )
        self._close = weakref.finalize(self, commands.put, Close())  # once, whether asked to or forgotten
        self._close.atexit = False
        self._thread.start()

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any = None,
        request_id: str | None = None,
        *,
        sampling_params_list: Sequence[OmniDiffusionSamplingParams] | None = None,
        output_modalities: Sequence[str] | None = None,
        lora_request: Any = None,
    ) -> AsyncIterator[OmniRequestOutput]:
        """Progress after each step (with images every `preview_every` steps), then the finished output or its `.error`.

        A request that is refused raises, and EngineDeadError does if the engine fails. Leaving the iterator, or
        cancelling its task, aborts the request within one step. While generation is paused it waits.
        `sampling_params_list` is of one stage, the only one here; `output_modalities` says what the caller expects;
        `lora_request` names adapters, as in the parameters.
        """
        given = given_parameters(_one_stage(sampling_params, sampling_params_list, lora_request))
        _check_modalities(output_modalities, self._makes)
        normalise_prompt(prompt)

        def begin(request: InFlightRequest) -> None:
            if not self._close.alive:
                raise EngineClosedError("the engine is closed")
            self._commands.put(Add(request.engine_id, own(prompt), own(given), 0, time.monotonic(), None))

        own_id = uuid4().hex if request_id is None else request_id
        while self._paused.is_set() and self._close.alive and self._thread.is_alive():
            await asyncio.sleep(_LOOK_AGAIN_S)
        async with aclosing(self._requests.stream(own_id, prompt, begin)) as outputs:
            async for output in outputs:
                yield output

    async def pause_generation(self, *, wait_for_inflight_requests: bool = False) -> None:
        """Let later requests wait until `resume_generation`; those in flight are aborted, or waited for."""
        self._paused.set()
        if not wait_for_inflight_requests:
            self._requests.abort(self._requests.ids)
        while len(self._requests):
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def resume_generation(self) -> None:
        self._paused.clear()

    async def is_paused(self) -> bool:
        return self._paused.is_set()

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

    async def add_lora(self, name: str, path: str) -> bool:
        """Load one more adapter, which requests then name."""
        return name in (await self.control(LoadAdapter(name, path))).adapters

    async def remove_lora(self, name: str) -> bool:
        """No later request gets the adapter; those that have it keep it."""
        return name not in (await self.control(UnloadAdapter(name))).adapters

    async def list_loras(self) -> set[str]:
        """The adapters that requests may name."""
        return set(self._loop.control.condition.adapters)

    async def check_health(self) -> None:
        """EngineDeadError or EngineClosedError unless the engine's thread takes requests."""
        if not self._close.alive:
            raise EngineClosedError("the engine is closed")
        if not self._thread.is_alive():
            raise EngineDeadError("the engine's thread has ended; make a new one")

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


def _one_stage(
    params: Any, stages: Sequence[OmniDiffusionSamplingParams] | None, adapters: Any
) -> OmniDiffusionSamplingParams:
    """The parameters of a request, however they were given."""
    if stages is not None:
        listed = [stages] if isinstance(stages, OmniDiffusionSamplingParams) else list(stages)
        if len(listed) != 1 or params is not None:
            fix = "must hold the parameters of one stage, without sampling_params beside it"
            raise InvalidValueError("sampling_params_list", f"{len(listed)} entries", fix)
        params = listed[0]
    params = OmniDiffusionSamplingParams() if params is None else OmniDiffusionSamplingParams.from_params(params)
    if adapters is not None:
        if params.lora_request is not None:
            raise InvalidValueError("lora_request", adapters, "is in the parameters already; give it once")
        params = OmniDiffusionSamplingParams(**{**dict(params), "lora_request": adapters})  # with its lora_scale
    return params


def _check_modalities(asked: Sequence[str] | None, makes: str) -> None:
    for name in [asked] if isinstance(asked, str) else asked or ():
        if name not in (makes, "audio"):
            raise InvalidValueError("output_modalities", name, f"must be {makes!r}: what this model makes")


def _closed(request_id: str) -> OmniRequestOutput:
    return OmniRequestOutput(
        request_id, error=RequestAbortedError(f"request {request_id} was aborted: the engine closed")
    )
