"""The HTTP application over an engine: routes, the middleware before them, and one way to fail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from difflib import get_close_matches

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from vllm_omni import _vllm_compat
from vllm_omni.engine.interface import EngineClient
from vllm_omni.entrypoints.openai import admin, chat, images, info, metrics, page, server_adapters, sounds, videos
from vllm_omni.entrypoints.openai.decoding import Decoder
from vllm_omni.entrypoints.openai.jobs import Jobs
from vllm_omni.entrypoints.openai.middleware import OPEN_PATHS, add_middleware
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, as_api_error, invalid
from vllm_omni.entrypoints.openai.protocol.replies import ERRORS
from vllm_omni.entrypoints.openai.state import AppState
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.errors import forget_locals
from vllm_omni.version import __version__

_MOST_SHOWN = 60  # characters of a wrong address that are compared, or of a method that are shown


def build_app(engine: EngineClient, config: ServeConfig) -> FastAPI:
    """The application; `engine` must have started. With keys set, every route but the health probes needs one."""
    docs = {} if config.http.disable_fastapi_docs else {"docs_url": "/docs", "openapi_url": "/openapi.json"}
    app = FastAPI(
        title="vllm-omni",
        version=__version__,
        root_path=config.http.root_path.rstrip("/"),
        redirect_slashes=False,
        responses=ERRORS,
        lifespan=_lifespan,
        **{"docs_url": None, "redoc_url": None, "openapi_url": None, **docs},  # type: ignore[arg-type]
    )
    if config.otlp_traces_endpoint:
        _vllm_compat.start_tracing(config.otlp_traces_endpoint)
    keys = len(config.http.api_key)
    jobs = Jobs(engine, Decoder(config.limits.max_input_pixels), max(1, config.places // keys) if keys > 1 else None)
    state = app.state.omni = AppState(engine, config, jobs, videos.open_jobs(jobs, config))
    for part in (images, videos, sounds, chat, info, metrics, admin, server_adapters):
        app.include_router(part.router)
    if not config.http.disable_fastapi_docs:
        _describe_once(app)
    open_paths = OPEN_PATHS
    if config.ui:
        app.include_router(page.router)
        open_paths |= {page.PATH}  # a static page that knows nothing; what it asks for needs the key
    for kind in (ApiError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _error_reply)
    add_middleware(app, state, open_paths)
    return app


def _describe_once(app: FastAPI) -> None:
    """Keep the description as it is sent: FastAPI would encode it for each of those who ask."""
    rendered: dict[str, bytes] = {}  # by the proxy's path
    app.router.routes[:] = [route for route in app.router.routes if "openapi.json" not in str(vars(route).get("path"))]

    async def description(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        if root not in rendered:
            rendered[root] = bytes(JSONResponse(app.openapi() | ({"servers": [{"url": root}]} if root else {})).body)
        return Response(rendered[root], media_type="application/json")

    app.add_route("/openapi.json", description, include_in_schema=False)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.omni
    with closing(state.jobs.decoder):
        yield


def _no_route(request: Request, error: HTTPException) -> ApiError:
    """What a request that met no route could have asked for."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    if error.status_code == 405:
        here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        allowed = ", ".join(sorted({method for route in here for method in route.methods or ()}))
        asked = request.scope["state"]["facts"]["method"]  # a HEAD is looked for as a GET
        text = f"this address takes {allowed}, not {asked[:_MOST_SHOWN]}"
        return ApiError(405, text, "method_not_allowed", headers={"Allow": allowed})
    known = {route.path for route in routes if "{" not in route.path}
    close = get_close_matches(request.url.path[:_MOST_SHOWN], sorted(known), n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}?" if close else f"{request.app.docs_url or 'docs/serving.md'} lists them all"
    return ApiError(404, f"this server has no such address; {hint}", "not_found")


async def _error_reply(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = _no_route(request, error)
    if isinstance(error, RequestValidationError):  # of a path or a query
        first = error.errors()[0]
        error = invalid(".".join(str(part) for part in first["loc"][1:]) or None, str(first["msg"]))
    forget_locals(error)  # they hold the client's pictures
    return as_api_error(error, request.scope["state"].get("names")).response()
