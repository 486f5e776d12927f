"""Frames to one of Ray Serve's replicas, by its name. Needs the extra `[ray]`.

Serve starts, watches, replaces and scales the replicas; the pool decides which of them takes a request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
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

    async def describe(self) -> bytes:
        with _lost():
            answer: bytes = await self._call(self._handle.describe)
            return answer

    def watch(self) -> AsyncGenerator[bytes, None]:
        return self._stream(self._handle.watch)

    def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        return self._stream(self._handle.generate, frame, timeout_s)

    async def control(self, frame: bytes) -> bytes:
        with _lost():
            answer: bytes = await self._call(self._handle.control, frame)
            return answer

    async def abort(self, request_ids: list[str]) -> None:
        with _lost():
            await self._call(self._handle.abort, request_ids)

    def _call(self, method: Any, *args: Any) -> Any:
        """Call a method, outside the HTTP request that it belongs to: Serve takes two calls of one request for one."""
        return Context().run(method.remote, *args, replica=self._replica)

    async def _stream(self, method: Any, *args: Any) -> AsyncGenerator[bytes, None]:
        """What a method yields; leaving it cancels the method where it runs."""
        stream = self._call(method.options(stream=True), *args)
        try:
            with _lost():
                async for frame in stream:
                    yield frame
        finally:
            stream.cancel()


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
