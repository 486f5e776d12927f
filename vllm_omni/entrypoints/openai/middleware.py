"""What stands before every route: a request id, the key, the limit of the body, and one answer to any failure."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from contextlib import suppress
from hashlib import sha256
from inspect import isclass
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni import _vllm_compat
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, as_api_error
from vllm_omni.entrypoints.openai.state import AppState
from vllm_omni.entrypoints.serve_config import imported
from vllm_omni.errors import forget_locals
from vllm_omni.logger import init_logger
from vllm_omni.logger import told as traces

logger = init_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})  # probes carry no key
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_LABEL = re.compile(r"[\w-]+", re.ASCII)  # a name without a dot is nobody's to register, hence of this network
LINGER_S = 2.0  # for the rest of a body that is refused: closing at once would reset the connection, answer and all
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def add_middleware(app: FastAPI, state: AppState, open_paths: frozenset[str]) -> None:
    """The operator's own innermost, then the gatekeeper, then CORS: a browser asks for permission without its key."""
    options = state.config.http
    for found in map(imported, options.middleware):
        if isclass(found):
            app.add_middleware(found)  # type: ignore[arg-type]
        else:
            app.middleware("http")(found)
    app.add_middleware(Gatekeeper, state=state, open_paths=open_paths)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods,
            allow_headers=options.allowed_headers,
            allow_credentials=options.allow_credentials,
            expose_headers=("x-request-id", "retry-after", "openai-poll-after-ms"),
        )


class Gatekeeper:
    """ASGI middleware around the whole application. Without a key, only `open_paths` are answered."""

    def __init__(self, app: ASGIApp, state: AppState, open_paths: frozenset[str]) -> None:
        self.app, self.statuses, self.open_paths = app, state.statuses, open_paths
        http, hosts = state.config.http, frozenset(host.lower() for host in state.config.allowed_hosts)
        self.hosts = hosts or (LOOPBACK if http.host in LOOPBACK and not http.uds else hosts)
        self.origins = frozenset(http.allowed_origins)
        self.max_body = state.config.limits.max_body_bytes
        self.quiet = OPEN_PATHS | http.quiet_paths
        self.traced = bool(state.config.otlp_traces_endpoint)
        self.keys = [sha256(key.encode()).digest() for key in state.config.http.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websocket is served
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        method = scope["method"]
        if method == "HEAD":  # is a GET, of whose reply the server sends the head alone
            scope = {**scope, "method": "GET"}
        asked = headers.get("x-request-id", "")
        request_id = asked if _CLIENT_ID.fullmatch(asked) else uuid4().hex
        # What is known of the request, for its span and its log line: routes add to it, but never a prompt.
        facts: dict[str, Any] = {"request_id": request_id, "method": method}
        scope.setdefault("state", {}).update(request_id=request_id, facts=facts)
        began, began_ns, status = time.monotonic(), time.time_ns(), 0

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
            told = as_api_error(error, scope["state"].get("names"))
            if told.status == 500:  # a client's mistake, a full queue or a server that ends is no fault of ours
                logger.error("request %s failed:\n%s", request_id, traces(error, scope["state"].get("private", ())))
            forget_locals(error)
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
            facts |= {"route": path, "status": status, "seconds": round(time.monotonic() - began, 4)}
            level = logging.DEBUG if get_route_path(scope) in self.quiet else logging.INFO
            logger.log(level, "%s %s -> %d", method, path, status, extra=facts)
            if self.traced and path.startswith("/v1/"):
                _vllm_compat.record_span(f"{method} {path}", began_ns, headers, facts)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        owner = self._owner(headers) if self.keys else None
        if len(self.keys) > 1 and owner is not None:
            scope["state"]["facts"]["key"] = owner
        if self.keys and get_route_path(scope) not in self.open_paths and owner is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key", None,
                           "authentication_error", {"WWW-Authenticate": "Bearer"})  # fmt: skip
        if get_route_path(scope) not in self.open_paths:
            self._check_browser(scope["method"], headers)
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "Content-Length must be a number", "invalid_request")
        if len(length) > 15 or int(length) > self.max_body:
            raise self._too_large()
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(400, "compressed request bodies are not taken", "invalid_request")

    def _check_browser(self, method: str, headers: Headers) -> None:
        """Refuse what a foreign page makes a browser send: under a name of its own that leads here, or across sites."""
        host = _host_of(headers.get("host", ""))
        known = host in self.hosts or (self.hosts is LOOPBACK and _LABEL.fullmatch(host))
        if self.hosts and not known and "host" in headers:
            text = f"the Host header names {host[:100]!r}, which is not served; --allowed-hosts adds names"
            raise ApiError(400, text, "invalid_host")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if method in ("GET", "OPTIONS") or (origin is None and site is None):
            return  # nothing changes, or no browser asks
        if origin in self.origins or "*" in self.origins or site in ("same-origin", "none"):
            return
        if site is None and origin is not None and origin.partition("://")[2] == headers.get("host"):
            return
        text = "a page of another origin may not ask for this; --allowed-origins names those that may"
        raise ApiError(403, text, "cross_origin")

    def _owner(self, headers: Headers) -> int | None:
        """Which of the keys the client has sent."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = sha256(token.encode("latin-1")).digest()  # the bytes that were sent
        found = None
        for number, key in enumerate(self.keys):  # all of them, always: how long it takes reveals nothing
            found = number if hmac.compare_digest(given, key) else found
        return found if scheme.lower() == "bearer" else None

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


def _host_of(host: str) -> str:
    """The name or address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


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
