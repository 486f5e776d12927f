"""Frames to one of Ray Serve's replicas, by its name. Needs the extra `[ray]`.

Serve starts, watches, replaces and scales the replicas; the pool decides which of them takes a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import contextmanager
from contextvars import Context
from typing import Any

from ray.exceptions import RayError
from ray.serve._private import replica as serve_replica
from ray.serve.exceptions import RayServeException
from ray.util import get_node_ip_address

from vllm_omni.replicas.remote import LinkLostError


class RayLink:
    """A `Link` to one replica of a deployment whose methods are those of `EngineHost`."""

    def __init__(self, handle: Any, replica: str) -> None:
        self._handle, self._replica = handle, replica
        self._gone = asyncio.Event()

    async def describe(self) -> bytes:
        answer: bytes = await self._answer(self._call(self._handle.describe))
        return answer

    def watch(self) -> AsyncGenerator[bytes, None]:
        return self._stream(self._handle.watch)

    def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        return self._stream(self._handle.generate, frame, timeout_s)

    async def control(self, frame: bytes) -> bytes:
        answer: bytes = await self._answer(self._call(self._handle.control, frame))
        return answer

    async def abort(self, request_ids: list[str]) -> None:
        await self._answer(self._call(self._handle.abort, request_ids))

    async def note_waiting(self, seconds: float) -> None:
        """Tell the replica its share of what waits at the front, by which is scaled."""
        await self._answer(self._call(self._handle.note_waiting, seconds))

    def close(self) -> None:
        """Note that the replica has left: Serve would look for it for ever."""
        self._gone.set()

    def _call(self, method: Any, *args: Any) -> Any:
        """Call a method, outside the HTTP request that it belongs to: Serve takes two calls of one request for one."""
        return Context().run(method.remote, *args, replica=self._replica)

    async def _stream(self, method: Any, *args: Any) -> AsyncGenerator[bytes, None]:
        """What a method yields; leaving it cancels the method where it runs. One that has begun may end."""
        stream = self._call(method.options(stream=True), *args)
        try:
            frame = await self._answer(anext(stream, None))
            while frame is not None:
                yield frame
                with _lost():
                    frame = await anext(stream, None)
        finally:
            stream.cancel()

    async def _answer(self, call: Awaitable[Any]) -> Any:
        """What a call returns. LinkLostError if the replica dies, or leaves before it has answered."""
        gone, answer = asyncio.ensure_future(self._gone.wait()), asyncio.ensure_future(_awaited(call))
        try:
            await asyncio.wait([gone, answer], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise LinkLostError("it has left")
            with _lost():
                return answer.result()
        finally:
            gone.cancel()
            answer.cancel()


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


def keep_to_loopback() -> None:
    """Let the server that Serve opens in each replica for the others listen on loopback, if all of this Ray does.

    Serve binds it to every interface, whatever Ray itself does. To be called before a replica has been made.
    """
    if get_node_ip_address() != "127.0.0.1":
        return
    bind = serve_replica.add_port_to_grpc_server

    def bind_here(server: Any, address: str) -> int:
        port: int = bind(server, address.replace("[::]", "127.0.0.1"))
        return port

    serve_replica.add_port_to_grpc_server = bind_here


@contextmanager
def _lost() -> Any:
    try:
        yield
    except (RayError, RayServeException) as error:
        raise LinkLostError(type(error).__name__) from error
