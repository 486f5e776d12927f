"""One envelope for every error of every route: `{"error": {"message", "type", "param", "code"}}`. Knows no route."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from vllm_omni.errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    InvalidValueError,
    NumericalError,
    QueueFullError,
    RequestAbortedError,
    UnknownKeyError,
)

MAX_MESSAGE_CHARACTERS = 600
_NEVER_RETRY = {"x-should-retry": "false"}
# What must not leave the server: addresses of objects, absolute paths, the shape of a traceback.
_PRIVATE = re.compile(
    r"0x[0-9a-fA-F]{6,}|(?<![\w.:/])(?!/v1/)(?:/[\w.@+-]+){2,}/?|Traceback \(most recent call last\)[\s\S]*"
)
_BY_STATUS = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    410: ("invalid_request_error", "gone"),
    413: ("invalid_request_error", "request_too_large"),
}


@dataclass
class ApiError(Exception):
    """What a client is told. `code` is a word for programs, `param` the field that is wrong."""

    status: int
    message: str
    code: str
    param: str | None = None
    type: str = "invalid_request_error"
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The envelope; safe to show to anybody."""
        param = None if self.param is None else _safe(self.param)  # it may be a client's own word
        return {"error": {"message": _safe(self.message), "type": self.type, "param": param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, {**self.headers, **(headers or {})})


def _safe(text: str) -> str:
    text = _PRIVATE.sub("…", text)
    if len(text) > MAX_MESSAGE_CHARACTERS:
        text = text[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return text.encode("utf-8", "replace").decode()


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, code, param)


def unavailable(error: Exception, code: str, retry_after_s: float | None) -> ApiError:
    """A 503 that says when to come back; the official client waits that long."""
    seconds = str(max(1, math.ceil(retry_after_s or 5.0)))
    return ApiError(503, str(error), code, type="server_error", headers={"Retry-After": seconds})


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as what a client may know of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownKeyError):
        return invalid(error.field, str(error), "unknown_parameter")
    if isinstance(error, InvalidValueError):
        return invalid(error.field, str(error))
    if isinstance(error, QueueFullError):
        return unavailable(error, "queue_full", error.retry_after_s)
    if isinstance(error, EngineDrainingError | EngineClosedError):
        return unavailable(error, "draining", 10.0)
    if isinstance(error, EngineDeadError):
        return unavailable(error, "engine_dead", error.retry_after_s)
    if isinstance(error, DeadlineExceededError):
        return ApiError(504, str(error), "deadline_exceeded", type="server_error", headers=dict(_NEVER_RETRY))
    if isinstance(error, NumericalError):
        return ApiError(500, str(error), "numerical_error", type="server_error", headers=dict(_NEVER_RETRY))
    if isinstance(error, RequestAbortedError):
        return ApiError(499, str(error), "request_cancelled", headers=dict(_NEVER_RETRY))
    if isinstance(error, HTTPException):
        kind, code = _BY_STATUS.get(error.status_code, ("invalid_request_error", "invalid_request"))
        return ApiError(error.status_code, str(error.detail), code, type=kind, headers=dict(error.headers or {}))
    return ApiError(500, "the request failed inside the server; its log has the cause", "engine_error", None,
                    "server_error")  # fmt: skip
