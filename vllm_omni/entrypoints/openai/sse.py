"""A stream of server-sent events that never ends in silence: an error is an event, a pause is a comment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error
from vllm_omni.entrypoints.openai.jobs import gone
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

FIRST_S = 1.0  # how long an error may take to come as a status of its own; later it is an event
Event = tuple[str | None, dict[str, Any] | str]  # name (None: data alone) and data


class EventStream(Response):
    """A response over an iterator of events. A client that goes away closes the iterator at once."""

    def __init__(self, events: AsyncIterator[Event], keep_alive_s: float) -> None:
        super().__init__(media_type="text/event-stream")
        self.events, self.keep_alive_s = events, keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inbox: asyncio.Queue[Event | ApiError | None] = asyncio.Queue()
        pump = asyncio.create_task(self._pump(inbox))
        pump.add_done_callback(lambda task: task.cancelled() or inbox.put_nowait(_last(task.exception())))  # type: ignore[func-returns-value]
        write = asyncio.create_task(self._write(inbox, scope, receive, send))
        watch = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({write, watch}, return_when=asyncio.FIRST_COMPLETED)
            if write.done():
                write.result()
        finally:
            for task in (pump, write, watch):
                task.cancel()
            await asyncio.gather(pump, write, watch, return_exceptions=True)

    async def _pump(self, inbox: asyncio.Queue[Event | ApiError | None]) -> None:
        async with aclosing(self.events) as events:  # type: ignore[type-var]
            async for event in events:
                inbox.put_nowait(event)

    async def _write(
        self, inbox: asyncio.Queue[Event | ApiError | None], scope: Scope, receive: Receive, send: Send
    ) -> None:
        item = await _within(inbox, FIRST_S)
        if isinstance(item, ApiError):
            return await item.response()(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while item is not None:
            await send({"type": "http.response.body", "body": _frame(item), "more_body": True})
            if isinstance(item, ApiError):
                break
            item = await _within(inbox, self.keep_alive_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _last(error: BaseException | None) -> ApiError | None:
    """What a stream ends with: nothing more, or what went wrong."""
    if error is None:
        return None
    told = as_api_error(error)
    if told.status == 500:
        logger.error("a stream failed", exc_info=error)
    return told


_COMMENT: Event = ("", "")


async def _within(inbox: asyncio.Queue[Any], seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may swallow being cancelled
            return await inbox.get()
    except TimeoutError:
        return _COMMENT


def _frame(item: Event | ApiError) -> bytes:
    if isinstance(item, ApiError):
        return b"event: error\ndata: " + json.dumps({"type": "error", **item.body()}).encode() + b"\n\n"
    name, data = item
    if name == "":
        return b": keep-alive\n\n"
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()
