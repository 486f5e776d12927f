"""The HTTP application over an engine: routes, the gate before them, and one way to fail."""

from __future__ import annotations

from importlib import import_module
from inspect import isclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from vllm_omni import _vllm_compat
from vllm_omni.engine.interface import EngineClient
from vllm_omni.entrypoints.openai import chat, images, info, metrics, page, schemas, videos
from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error, invalid
from vllm_omni.entrypoints.openai.gate import OPEN_PATHS, Gate
from vllm_omni.entrypoints.openai.jobs import Jobs
from vllm_omni.entrypoints.openai.state import Served
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.version import __version__


def build_app(engine: EngineClient, config: ServeConfig) -> FastAPI:
    """The application; `engine` must have started. Every route but the health probes needs a key where keys are set."""
    http = config.http
    docs = {} if http.disable_fastapi_docs else {"docs_url": "/docs", "openapi_url": "/openapi.json"}
    app = FastAPI(
        title="vllm-omni",
        version=__version__,
        root_path=http.root_path,
        redirect_slashes=False,
        responses=schemas.ERRORS,
        **{"docs_url": None, "redoc_url": None, "openapi_url": None, **docs},  # type: ignore[arg-type]
    )
    if config.otlp_traces_endpoint:
        _vllm_compat.start_tracing(config.otlp_traces_endpoint)
    state = app.state.served = Served(engine, config, Jobs(engine))
    app.state.videos = videos.open_jobs(state)
    for router in (images.router, videos.router, chat.router, info.router, metrics.router):
        app.include_router(router)
    open_paths = OPEN_PATHS
    if config.ui:
        app.include_router(page.router)
        open_paths |= {page.PATH}  # a static page that knows nothing; what it asks for needs the key
    for kind in (ApiError, HTTPException):
        app.add_exception_handler(kind, _told)
    app.add_exception_handler(RequestValidationError, _not_valid)
    for name in http.middleware:
        _add_middleware(app, name)
    app.add_middleware(
        Gate,
        keys=http.api_key,
        max_body=int(config.limits.max_body_mb * 2**20),
        open_paths=open_paths,
        statuses=state.statuses,
        traced=bool(config.otlp_traces_endpoint),
    )
    if http.allowed_origins:  # outermost: a browser asks for leave without its key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.allowed_origins,
            allow_methods=http.allowed_methods,
            allow_headers=http.allowed_headers,
            allow_credentials=http.allow_credentials,
            expose_headers=("x-request-id", "retry-after", "openai-poll-after-ms"),
        )
    return app


async def _told(request: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


async def _not_valid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return invalid(".".join(str(part) for part in first["loc"][1:]) or None, str(first["msg"])).response()


def _add_middleware(app: FastAPI, name: str) -> None:
    """As `vllm serve --middleware`: the dotted name of an ASGI class, or of a function of request and call_next."""
    module, _, attribute = name.rpartition(".")
    found: Any = vars(import_module(module))[attribute]
    if isclass(found):
        app.add_middleware(found)  # type: ignore[arg-type]
    else:
        app.middleware("http")(found)
