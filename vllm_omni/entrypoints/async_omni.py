"""Asynchronous generation: the engine in a thread of its own, requests joining and leaving its batch at any step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Self
from uuid import uuid4

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import EngineClosedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.outputs import OmniRequestOutput

Deliver = Callable[[OmniRequestOutput], None]


class AsyncOmni:
    """`async for output in AsyncOmni("demo").generate("red apple"): ...`; the last output is finished."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._open(lambda: DiffusionEngine(OmniDiffusionConfig(model=model, **engine_args)))

    @classmethod
    def from_pipe(cls, pipe: Any, *, defaults: dict[str, Any] | None = None, **engine_args: Any) -> Self:
        """An engine over a diffusers pipeline that is loaded already."""
        omni = cls.__new__(cls)
        name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        omni._open(lambda: DiffusionEngine(OmniDiffusionConfig(model=name, **engine_args), pipe, defaults))
        return omni

    def _open(self, make_engine: Callable[[], DiffusionEngine]) -> None:
        self.engine = make_engine()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vllm-omni-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Any,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[OmniRequestOutput]:
        """Progress after each step (with images every `preview_every` steps), then the finished output or its `.error`.

        A request that is refused raises. Leaving the iterator, or cancelling its task, aborts the request within one
        step.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed")
        request = OmniDiffusionRequest(
            request_id or uuid4().hex,
            prompt,
            normalise_prompt(prompt),
            sampling_params or OmniDiffusionSamplingParams(),
        )
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[OmniRequestOutput | Exception] = asyncio.Queue()

        def deliver(item: OmniRequestOutput | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        self._commands.put(lambda: self._add(request, deliver))
        ended = False
        try:
            while not ended:
                item = await inbox.get()
                if isinstance(item, Exception):
                    ended = True
                    raise item
                ended = item.finished
                yield item
        finally:
            if not ended:
                self._commands.put(lambda: self._drop(request.request_id))

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests within one step; their iterators give an output whose error says so."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self._commands.put(lambda: self.engine.abort(ids))

    def close(self) -> None:
        """Abort what runs and stop the thread."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
            self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def _add(self, request: OmniDiffusionRequest, deliver: Callable[[Any], None]) -> None:
        try:
            self.engine.add_request(request)
        except Exception as error:  # told to the one who asked
            deliver(error)
        else:
            self._deliver[request.request_id] = deliver

    def _drop(self, request_id: str) -> None:
        self._deliver.pop(request_id, None)
        self.engine.abort([request_id])

    def _run(self) -> None:
        while self._obey():
            for output in self.engine.step():
                if (deliver := self._deliver.pop(output.request_id, None)) is not None:
                    deliver(output)
            for report in self.engine.progress():
                if (deliver := self._deliver.get(report.request_id)) is not None:
                    deliver(report)
        self.engine.abort(list(self._deliver))
        for output in self.engine.step():
            if (deliver := self._deliver.pop(output.request_id, None)) is not None:
                deliver(output)
        self.engine.close()

    def _obey(self) -> bool:
        """Take the commands that wait; with nothing to do, wait for one. False: stop."""
        block = not self.engine.has_unfinished_requests()
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = block and not self.engine.has_unfinished_requests()
