"""Connections that cost nobody else anything: time-outs, and a cap below the limit of file descriptors.

uvicorn has a time-out between two requests alone. This protocol, which it is given as its `http`, also ends a
connection that does not finish its request's head, stops in the middle of a body, or does not read its reply. At the
cap, the connection that has been without a request for longest makes room for the new one. With `Loop`, all of this
also holds for a connection whose TLS handshake has not ended.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from vllm_omni.logger import init_logger

logger = init_logger(__name__)

HEAD_S = 10.0  # for the head of a request, from its connection or the reply before; less, if clients have less time
MAX_HEAD = 2**20  # bytes that are no body, in one request: its head, its trailers, what is beside its chunks
_PER_BODY_BYTE = 16  # so many more for each byte of its body, which may come in chunks of one
LEAST_BYTES = 64 * 2**10  # of its reply that a client must take within the time-out
_CALLS_BACK = "on_body" in vars(AutoHTTPProtocol)  # httptools; h11 has limits of its own
_SPARE = 32  # descriptors for files, pictures' decoders and the engine
_SWEEP_S = 0.5
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def room(wanted: int) -> tuple[int, int]:
    """(connections, backlog) below this process's limit of descriptors, which is raised as far as it may be."""
    backlog, (soft, hard) = 128, resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd")) + _SPARE
    needed = wanted + 2 * backlog + used
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    backlog = min(backlog, soft // 8)  # as many are accepted in one turn of the loop, before any of them is counted
    return max(8, min(wanted, soft - used - 2 * backlog)), backlog


class Accepting:
    """The loop's handler of errors: it repeats that it cannot accept a connection, which is said once a second."""

    said = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "accept" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() - self.said >= 1.0:
            self.said = time.monotonic()
            logger.error("%s: %s", context["message"], context.get("exception"))


class Loop(asyncio.SelectorEventLoop):
    """The loop of a server whose protocols are `guarded`: it makes their TLS connections."""

    async def create_server(self, protocol_factory: Callable[[], Any], *places: Any, **options: Any) -> asyncio.Server:  # type: ignore[override]
        """As the standard loop's, but for `ssl`."""
        context = options.pop("ssl", None)

        def greeting() -> asyncio.BaseProtocol:
            return _Greeting(self, protocol_factory(), context)

        return await super().create_server(protocol_factory if context is None else greeting, *places, **options)


class _Greeting(SSLProtocol):
    """TLS under a guarded protocol, which counts it from its first byte and learns of the end of its handshake."""

    def __init__(self, loop: asyncio.AbstractEventLoop, guarded: Any, context: Any) -> None:
        self.guarded, most = guarded, guarded.handshake_s
        waiter: Any = None  # nobody waits for the handshake
        super().__init__(loop, guarded, context, waiter, True, ssl_handshake_timeout=most, ssl_shutdown_timeout=most)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.guarded.greet(transport)
        super().connection_made(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self.guarded.greeted()
        super().connection_lost(error)


class _Counted:
    """A transport that counts what is written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport, self.written = transport, 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class Guarded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that is watched; `since` is when it last did what it has to do next."""

    most: ClassVar[int]
    timeout_s: ClassVar[float]
    keep_alive_s: ClassVar[float]  # between a reply and the head of the next request, if that is longer
    handshake_s: ClassVar[float]
    greeting: ClassVar[dict[Guarded, tuple[float, asyncio.Transport]]]  # in their TLS handshakes, since when
    sweeping: ClassVar[bool] = False
    leaving = False

    def greet(self, transport: asyncio.Transport) -> None:
        """A TLS handshake begins."""
        if self.find_room():
            self.greeting[self] = time.monotonic(), transport
        else:
            transport.abort()

    def greeted(self) -> None:
        self.greeting.pop(self, None)

    def find_room(self) -> bool:
        """Whether one more may stay: the one that has been without a request for longest goes for it."""
        staying = [one for one in self.connections if not one.leaving]
        if len(staying) + len(self.greeting) < self.most:
            return True
        unasked = {one: one.since for one in staying if one.owes} | {k: v[0] for k, v in self.greeting.items()}
        if not unasked:
            return False
        oldest = min(unasked, key=lambda one: unasked[one])
        transport = self.greeting.pop(oldest)[1] if oldest in self.greeting else oldest.transport
        oldest.leaving = True  # within this turn of the loop it is still there
        transport.abort()
        return True

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.greeted()
        room = self.find_room()
        super().connection_made(_Counted(transport))
        self.since, self.taken, self.beside = time.monotonic(), 0, 0
        if not room:
            self.transport.write(_BUSY)
            return self.transport.close()
        if not self.sweeping:
            type(self).sweeping = True
            self.loop.call_later(_SWEEP_S, self.sweep, self.loop, self.connections)

    def data_received(self, data: bytes) -> None:
        if not self.idle:  # bytes of a head that never ends are no progress
            self.since = time.monotonic()
        self.beside += len(data)
        super().data_received(data)
        if self.beside > MAX_HEAD and _CALLS_BACK:
            self.transport.abort()  # the parser keeps all of it

    def on_message_begin(self) -> None:
        self.beside = 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self.beside -= (1 + _PER_BODY_BYTE) * len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    @property
    def idle(self) -> bool:
        """No request has begun, or the last one has been answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def owes(self) -> bool:
        """The client has not sent its whole request."""
        return self.idle or (self.cycle.more_body and not self.flow.read_paused)

    def check(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        taken = self.transport.written - unsent
        reads = taken >= self.taken + LEAST_BYTES or (taken > self.taken and not unsent)
        if reads or not (unsent or self.owes):  # it reads its reply, or waits for one
            self.since, self.taken = now, taken
        limit = min(HEAD_S, self.timeout_s) if self.idle and not unsent else self.timeout_s
        if self.idle and not unsent and self.cycle is not None:
            limit = max(limit, self.keep_alive_s)
        if now - self.since > limit:
            self.transport.abort()

    @classmethod
    def sweep(cls, loop: asyncio.AbstractEventLoop, connections: set[Guarded]) -> None:
        for one in [*connections]:
            one.check(time.monotonic())
        cls.sweeping = bool(connections)
        if connections:
            loop.call_later(_SWEEP_S, cls.sweep, loop, connections)


def guarded(most: int, timeout_s: float, keep_alive_s: float = 0.0) -> type[Guarded]:
    """The protocol with that cap and those time-outs."""
    limits = {"most": most, "timeout_s": timeout_s, "keep_alive_s": keep_alive_s, "greeting": {}}
    return type("Limited", (Guarded,), limits | {"handshake_s": min(HEAD_S, timeout_s)})
