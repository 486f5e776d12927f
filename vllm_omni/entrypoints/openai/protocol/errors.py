"""One envelope for every error of every route: `{"error": {"message", "type", "param", "code"}}`. Knows no route."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vllm_omni import errors

MAX_MESSAGE_CHARACTERS = 600
# What must not leave the server: addresses of objects, absolute paths, the shape of a traceback.
_PRIVATE = re.compile(
    r"0x[0-9a-fA-F]{6,}|(?<![\w.:/])(?!/v1/)(?:/[\w.@+-]+){2,}/?|Traceback \(most recent call last\)[\s\S]*"
)
# The package's own errors, subclasses first: status and code.
_OURS: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.UnknownKeyError, 400, "unknown_parameter"),
    (errors.UnknownAdapterError, 404, "not_found"),
    (errors.InvalidValueError, 400, "invalid_value"),
    (errors.ModelLoadError, 400, "invalid_model"),
    (errors.DeviceMemoryError, 400, "out_of_memory"),
    (errors.ConflictError, 409, "conflict"),
    (errors.RequestAbortedError, 499, "request_cancelled"),
    (errors.NumericalError, 500, "numerical_error"),
    (errors.StoreError, 503, "store_failed"),
    (errors.QueueFullError, 503, "queue_full"),
    (errors.EngineAsleepError, 503, "asleep"),
    (errors.EngineDrainingError, 503, "draining"),
    (errors.EngineClosedError, 503, "draining"),
    (errors.EngineDeadError, 503, "engine_dead"),
    (errors.DeadlineExceededError, 504, "deadline_exceeded"),
)
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ErrorDetail(BaseModel):
    """What went wrong. `code` is a word for programs, `param` the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


@dataclass
class ApiError(Exception):
    """An error as the client receives it."""

    status: int
    message: str
    code: str
    param: str | None = None
    type: str = "invalid_request_error"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def detail(self) -> ErrorDetail:
        """Safe to show to anybody."""
        param = None if self.param is None else _safe(self.param)  # it may be the client's own word
        return ErrorDetail(message=_safe(self.message), type=self.type, param=param, code=self.code)

    def response(self) -> Response:
        body = ErrorReply(error=self.detail).model_dump_json()
        return Response(body, self.status, self.headers, media_type="application/json")


def _safe(text: str) -> str:
    text = _PRIVATE.sub("…", text)
    if len(text) > MAX_MESSAGE_CHARACTERS:
        text = text[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return text.encode("utf-8", "replace").decode()


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, code, param)


def unavailable(message: str, code: str, retry_after_s: float | None) -> ApiError:
    """A 503 that says when to retry; the official client waits that long."""
    seconds = str(max(1, math.ceil(retry_after_s or 5.0)))
    return ApiError(503, message, code, type="server_error", headers={"Retry-After": seconds})


def as_api_error(error: BaseException, names: Mapping[str, str] | None = None) -> ApiError:
    """Any exception, reduced to what a client may know of it. `names`: the client's words for fields."""
    told = _as_api_error(error)
    if (name := (names or {}).get(told.param or "")) is None:
        return told
    return replace(told, param=name, message=re.sub(rf"\b{told.param}\b", name, told.message))


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client closed the connection", "client_closed_request")
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))
    status, code = next(((status, code) for kind, status, code in _OURS if isinstance(error, kind)), (500, ""))
    if not code:
        text = "the request failed inside the server; its log has the cause"
        return ApiError(500, text, "engine_error", type="server_error")
    if status == 503:
        told = error.retry_after_s if isinstance(error, errors.QueueFullError | errors.EngineDeadError) else 10.0
        return unavailable(str(error), code, told)
    if isinstance(error, errors.InvalidValueError):
        return ApiError(status, str(error), code, error.field)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ApiError(status, str(error), code, type=kind, headers={"x-should-retry": "false"})
