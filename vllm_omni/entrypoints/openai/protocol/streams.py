"""Replies that end when their client goes away, and streams that never end in silence: an error is an event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai.protocol.errors import ApiError, as_api_error
from vllm_omni.logger import init_logger
from vllm_omni.logger import told as traces

logger = init_logger(__name__)

T = TypeVar("T")
FIRST_S = 1.0  # within this time, an error is a status of its own; later it is an event
Event = tuple[str | None, BaseModel | dict[str, Any] | str]  # name (None: data alone) and data
_KEEP_ALIVE: Event = ("", "")
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no")]  # fmt: skip


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", "client_closed_request")
        return task.result()
    finally:
        await _cancel(task, watch)


class EventStream(Response):
    """Server-sent events. The iterator is closed as soon as the client goes away; pauses are filled with comments."""

    def __init__(self, events: AsyncGenerator[Event, None], keep_alive_s: float) -> None:
        super().__init__(media_type="text/event-stream")
        self.events, self.keep_alive_s = events, keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_gone(receive))
        following = asyncio.ensure_future(anext(self.events))
        started = False
        try:
            while True:
                patience = self.keep_alive_s if started else FIRST_S
                await asyncio.wait({following, watch}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    return
                item = _outcome(following, scope) if (came := following.done()) else _KEEP_ALIVE
                if not started:
                    if isinstance(item, ApiError):
                        return await item.response()(scope, receive, send)
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    started = True
                if item is not None:
                    await send({"type": "http.response.body", "body": _frame(item), "more_body": True})
                if item is None or isinstance(item, ApiError):
                    return await send({"type": "http.response.body", "body": b"", "more_body": False})
                if came:
                    following = asyncio.ensure_future(anext(self.events))
        finally:
            await _cancel(following, watch)
            await self.events.aclose()


def _outcome(following: asyncio.Future[Event], scope: Scope) -> Event | ApiError | None:
    """The next event; None after the last; or what went wrong."""
    if (error := following.exception()) is None:
        return following.result()
    if isinstance(error, StopAsyncIteration):
        return None
    told = as_api_error(error, scope.get("state", {}).get("names"))
    if told.status == 500:
        logger.error("a stream failed:\n%s", traces(error, scope.get("state", {}).get("private", ())))
    return told


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed the connection; to be called once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _frame(item: Event | ApiError) -> bytes:
    if isinstance(item, ApiError):
        item = "error", {"type": "error", "error": item.detail}
    if item == _KEEP_ALIVE:
        return b": keep-alive\n\n"
    name, data = item
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, data.encode() if isinstance(data, str) else to_json(data))
