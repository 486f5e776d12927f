"""`vllm serve MODEL --omni` and `vllm-omni serve MODEL`: the engine's process, the application, the HTTP server.

Everything that can be refused is refused before the model loads, in one line (`serve_flags.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from vllm_omni import _vllm_compat
from vllm_omni.engine.supervisor import Launch
from vllm_omni.entrypoints.cli.flags import named_by_flag
from vllm_omni.entrypoints.cli.serve_checks import check_needs, unix_socket
from vllm_omni.entrypoints.cli.serve_flags import build_parser, described, refuse_early, serve_config
from vllm_omni.entrypoints.engines import launch_engines, make_engine
from vllm_omni.entrypoints.serve_config import HttpOptions, ServeConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import JsonLines, init_logger, log_as_json
from vllm_omni.model_folder import resolve_model

logger = init_logger(__name__)

UVICORN = (  # flags of vLLM that are options of uvicorn by the same name
    "host", "port", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "enable_ssl_refresh",
    "h11_max_incomplete_event_size", "h11_max_header_count",
)  # fmt: skip


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Name the command; `run` parses its words."""
    return commands.add_parser("serve", help=summary, add_help=False)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    words = [part for word in args.words for part in _parts(word)]
    if "--help" in words or "-h" in words:
        print(described(argparse.ArgumentParser).format_help(), end="")
        return 0
    hide_keys(words)
    _vllm_compat.require()
    early = refuse_early(words)
    launches: list[Launch] = []
    if early:
        launches = launch_engines(early)
        if early.log_json:
            log_as_json()
    try:  # vLLM is imported from here on, and the engine loads meanwhile
        parsed = build_parser().parse_args(words)
        config = serve_config(parsed)
        check_needs(config, parsed)
        if config.log_json and not early:
            log_as_json()
        resolve_model(str(config.engine_args["model"]))
        from vllm_omni.entrypoints.openai.connections import Loop

        with asyncio.Runner(loop_factory=Loop) as runner, listening(config.http) as sock:
            return runner.run(_serve(config, uvicorn_options(parsed, config), launches, sock))
    finally:
        for launch in launches:
            launch.discard()


def _parts(word: str) -> list[str]:
    """`--config=FILE` as two words, which is how vLLM's parser wants it."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def hide_keys(words: Sequence[str]) -> None:
    """Blank the keys out of this process's command line, which `ps` shows to everybody on the machine."""
    shown, is_key = [], False
    for word in words:
        flag, equals, _ = word.replace("_", "-").partition("=")
        if word.startswith("--"):
            is_key = len(flag) > 3 and "--api-key".startswith(flag)  # argparse takes a flag's beginning for the flag
            shown.append(f"{flag}=***" if is_key and equals else word)
        else:
            shown.append("***" if is_key else word)
    if shown == list(words) or "serve" not in sys.orig_argv:  # no key, or called from a program
        return
    try:
        from setproctitle import setproctitle  # comes with vLLM
    except ImportError:
        return
    setproctitle(" ".join([*sys.orig_argv[: sys.orig_argv.index("serve") + 1], *shown]))


def uvicorn_options(args: argparse.Namespace, config: ServeConfig) -> dict[str, Any]:
    """The options of uvicorn, as vLLM sets them."""
    options, proxies = {name: value for name, value in vars(args).items() if name in UVICORN}, config.trusted_proxies
    if args.ssl_ciphers:
        options["ssl_ciphers"] = args.ssl_ciphers
    return options | {
        "log_level": args.uvicorn_log_level,
        "proxy_headers": bool(proxies),  # a client may send any: they count if the operator trusts who passes them on
        "forwarded_allow_ips": list(proxies),
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": config.http.keep_alive_s,
        "timeout_graceful_shutdown": 5,  # replies are already sent; don't wait for clients that stopped reading
        "server_header": False,
        "log_config": None,  # its lines go where ours go
    }


@contextmanager
def listening(http: HttpOptions) -> Iterator[socket.socket]:
    """The bound socket of these options until the block ends; InvalidValueError names the flag if it cannot be had."""
    with ExitStack() as stack:
        try:
            bound = unix_socket(http.uds) if http.uds else _vllm_compat.listen(http.host, http.port)
            sock = stack.enter_context(bound)
        except OSError as error:
            flag, where = ("--uds", http.uds) if http.uds else ("--port", f"{http.host}:{http.port}")
            raise InvalidValueError(flag, where, f"cannot be used ({error.strerror or error})") from None
        yield sock


async def _serve(config: ServeConfig, options: dict[str, Any], launches: list[Launch], sock: socket.socket) -> int:
    from vllm_omni.entrypoints.openai.app import build_app
    from vllm_omni.entrypoints.openai.connections import Accepting, guarded, room

    http = config.http
    _vllm_compat.adopt_logging(JsonLines() if config.log_json else None)
    _vllm_compat.hide_requests(http.quiet_paths)
    logger.info("serving %s: %s", config.model_names[0], json.dumps(config.engine_args, default=str))
    engine = make_engine(config, launches)
    connections, backlog = room(config.limits.max_connections)
    protocol = guarded(connections, config.limits.client_timeout_s, http.keep_alive_s)
    options |= {"http": protocol, "backlog": backlog}
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(Accepting())
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        loop.add_signal_handler(signal.SIGHUP, signal.raise_signal, signal.SIGTERM)

    async def stop() -> None:
        await engine.drain(config.shutdown_timeout_s)
        await engine.shutdown()  # ends what still runs with an error: the server waits for its replies

    try:
        await engine.start()
        with named_by_flag(ServeConfig):  # a store that another server has taken meanwhile
            app = build_app(engine, config)
        gc.collect()
        gc.freeze()  # imported modules stay: scanning them again would delay replies by tenths of a second
        await _vllm_compat.serve_http(app, sock, stop, config.shutdown_timeout_s, **options)
    finally:
        await engine.shutdown()
    return 0
