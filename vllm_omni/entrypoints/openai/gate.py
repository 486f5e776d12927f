"""What stands before every route: a request id, the key, the limit of the body, and one answer to any failure."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from uuid import uuid4

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni import _vllm_compat
from vllm_omni.entrypoints.openai import facts
from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})  # probes carry no key
LINGER_S = 2.0  # for the rest of a body that is refused: closing at once would reset the connection, answer and all
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gate:
    """ASGI middleware around the whole application. Without the key nothing is answered but `open_paths`."""

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], max_body: int, open_paths: frozenset[str], statuses: Counter[int],
        traced: bool = False,
    ) -> None:  # fmt: skip
        self.app, self.max_body, self.open_paths, self.statuses = app, max_body, open_paths, statuses
        self.traced = traced
        self.keys = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websocket is served
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _CLIENT_ID.fullmatch(asked) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began, began_ns, status = time.monotonic(), time.time_ns(), 0
        known = facts.begin(request_id=request_id, method=scope["method"])

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": request_id, "x-content-type-options": "nosniff"})
            await send(message)

        try:
            self._admit(scope, headers)
            await self.app(scope, self._counted(receive), reply)
        except Exception as error:  # whatever it was, the client gets the envelope and the server lives
            told = as_api_error(error)
            if told.status == 500:  # a client's mistake, a full queue or a server that ends is no fault of ours
                logger.exception("request %s failed", request_id)
            if status:
                raise  # the reply had begun: closing the connection is all that is left
            if isinstance(error, ApiError):
                await _refuse(error, receive, reply)  # its body has not been read
            else:
                await told.response()(scope, receive, reply)
        finally:
            self.statuses[status] += 1
            route = scope.get("route")
            path = route.path if route is not None else "(none)"
            known |= {"route": path, "status": status, "seconds": round(time.monotonic() - began, 4)}
            level = logging.DEBUG if get_route_path(scope) in OPEN_PATHS else logging.INFO
            logger.log(level, "%s %s -> %d", scope["method"], path, status, extra=known)
            if self.traced and path.startswith("/v1/"):
                _vllm_compat.record_span(f"{scope['method']} {path}", began_ns, headers, known)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if self.keys and get_route_path(scope) not in self.open_paths and not self._known(headers):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key", None,
                           "authentication_error", {"WWW-Authenticate": "Bearer"})  # fmt: skip
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "Content-Length must be a number", "invalid_request")
        if len(length) > 15 or int(length) > self.max_body:
            raise self._too_large()
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(400, "compressed request bodies are not taken", "invalid_request")

    def _known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = False
        for key in self.keys:  # all of them, always: how long it takes tells nothing
            found |= hmac.compare_digest(given, key)
        return found and scheme.lower() == "bearer"

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body may have at most {self.max_body} bytes", "request_too_large",
                        headers={"Connection": "close"})  # fmt: skip


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer at once; then read what the client still sends, for a while, and keep none of it."""
    response = error.response()
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body"})
