"""Orders running in the engine: one engine request per picture, ended together when their client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm_omni.engine.interface import EngineClient
from vllm_omni.entrypoints.openai import facts
from vllm_omni.entrypoints.openai.errors import ApiError
from vllm_omni.entrypoints.openai.order import Order
from vllm_omni.errors import InvalidValueError, RequestAbortedError
from vllm_omni.outputs import OmniRequestOutput

T = TypeVar("T")
Item = tuple[int, OmniRequestOutput]


@dataclass
class Jobs:
    """What runs, by the id that the client was given."""

    engine: EngineClient
    running: dict[str, asyncio.Queue[Item | BaseException]] = field(default_factory=dict)

    async def cancel(self, job_id: str) -> bool:
        """End a job within one step; False for an id that does not run.

        The job itself is told, not the engine: a job may be so young that the engine has not heard of it.
        """
        if (inbox := self.running.get(job_id)) is None:
            return False
        inbox.put_nowait(RequestAbortedError(f"request {job_id} was cancelled"))
        return True

    async def run(self, order: Order, job_id: str) -> AsyncIterator[Item]:
        """(index of the picture, progress or the finished output), as they come; raises the first failure.

        Leaving the iterator, or a failure of one picture, ends them all.
        """
        if job_id in self.running:
            raise InvalidValueError("X-Request-Id", job_id, "must not be in use")
        facts.note(model=order.model, size=order.size, n=len(order.params))
        ids = [f"{job_id}-{i}" for i in range(len(order.params))]
        inbox: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self.running[job_id] = inbox

        async def one(index: int) -> None:
            stream = self.engine.generate(
                order.prompt, order.params[index], ids[index], priority=order.priority, timeout_s=order.timeout_s
            )
            async with aclosing(stream) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    inbox.put_nowait((index, output))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                inbox.put_nowait(error)

        tasks = [asyncio.create_task(one(i)) for i in range(len(ids))]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            left = len(ids)
            while left:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                if item[1].finished:
                    facts.count(computed_steps=item[1].computed_steps, skipped_steps=item[1].skipped_steps)
                if item[1].error is not None:
                    raise item[1].error
                left -= item[1].finished
                yield item
        finally:
            del self.running[job_id]  # before anything waits: a client may leave in this very turn
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", "client_closed_request")
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed the connection; to be called once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
