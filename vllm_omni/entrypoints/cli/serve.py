"""`vllm serve MODEL --omni` and `vllm-omni serve MODEL`: flags to a `ServeConfig`, then engine, application, server.

Everything that can be refused is refused before the model loads, in one line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vllm_omni import _vllm_compat, envs
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import resolve_model
from vllm_omni.engine.client import ProcessEngineClient, launch_engine
from vllm_omni.engine.supervisor import Launch
from vllm_omni.entrypoints.cli.engine_flags import MODEL, add_engine_flags, engine_args
from vllm_omni.entrypoints.cli.flags import add_flags, flag_of, given, named_by_flag
from vllm_omni.entrypoints.serve_config import HttpOptions, Limits, ServeConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import JsonLines, init_logger

logger = init_logger(__name__)

USAGE = "vllm serve MODEL --omni [options]   |   vllm-omni serve MODEL [options]"
DESCRIPTION = """Serve a model behind the OpenAI API for images and videos.

Requests of any size, number of steps and cache setting share one continuous
batch. The server listens on loopback unless told."""
EPILOG = """server flags, those of vLLM (--host, --port, --api-key, ...): --help=server
all flags: --help=all; one flag: --help=max-num-seqs

examples:
  vllm serve demo --omni --cache-backend magcache                the model that comes with the package
  vllm serve MODEL --omni --cache-backend magcache --cache-config fast
  vllm serve MODEL --omni --cache-backend magcache --cache-config '{"speedup": 2.0}'
  vllm serve MODEL --omni --host 0.0.0.0 --api-key SECRET --max-num-seqs 32 --ui
then, with the official client:
  OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any").images.generate(prompt="red apple")
"""

# Flags of other engines that exist, and mean something that this one does not do.
_BEHAVIOUR = [name for name, field in ServeConfig.model_fields.items() if field.description]
_BEHAVIOUR.remove("served_model_name")  # beside the model's flags
_PARALLEL = ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree", "ring_degree", "data_parallel_size")


def add_parser(commands: Any, summary: str) -> None:
    """Name the command; `run` parses its words."""
    commands.add_parser("serve", help=summary, add_help=False)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    words: list[str] = args.words
    if "--help" in words or "-h" in words:
        print(_described(argparse.ArgumentParser).format_help(), end="")
        return 0
    hide_keys(words)
    _vllm_compat.require()
    early = refuse_early(words)
    launch = launch_engine(early.engine_args, warmup=early.warmup, log_json=early.log_json) if early else None
    try:  # vLLM is imported from here on, and the engine loads meanwhile
        parsed = build_parser().parse_args(words)
        config = serve_config(parsed)
        resolve_model(str(config.engine_args["model"]))
        return asyncio.run(_serve(config, uvicorn_options(parsed), launch))
    finally:
        if launch is not None:
            launch.discard()


def build_parser() -> argparse.ArgumentParser:
    """vLLM's parser and server flags, and ours."""
    parser = _described(_vllm_compat.make_parser)
    _vllm_compat.add_frontend_flags(parser)
    return parser


def _described(make: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """A parser of that kind with our flags and what the help says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = make(prog="vllm serve", usage=USAGE, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--omni", action="store_true", help="tells vLLM that this is a diffusion model")
    add_own_flags(parser)
    return parser


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


def refuse_early(words: Sequence[str]) -> ServeConfig | None:
    """Refuse what is wrong with the model's folder and our own flags before vLLM is imported, which takes seconds.

    What our flags say; None if they may not be all, or if nothing will be served.
    """
    parser = argparse.ArgumentParser(prog="vllm serve", usage=USAGE, add_help=False, allow_abbrev=False)
    add_own_flags(parser)
    for name in ("host", "uds"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--config")
    dashed = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    args, _ = parser.parse_known_args(dashed)  # the rest is vLLM's: its flags, their values, `--config FILE`
    named = bool(words) and not words[0].startswith("-")
    args.model = words[0] if named else "demo"
    resolve_model(args.model)
    config = serve_config(args)
    help_asked = any(word.startswith("--help") for word in words)
    if not (config.http.uds or args.config or help_asked):  # a file may name another port; it is read later
        _check_port(config.http.host, config.http.port)
    return None if args.config or help_asked or not named else config


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InvalidValueError("--port", f"{host}:{port}", f"cannot be used ({error.strerror})") from None


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine", "The model, its cache and its batch.")
    add_flags(engine, ServeConfig, "served_model_name")
    add_engine_flags(engine)
    for name in _PARALLEL:
        engine.add_argument(flag_of(name), type=int, default=1, help=argparse.SUPPRESS)
    add_flags(parser.add_argument_group("limits", "Checked before any work is done for a request."), Limits)
    add_flags(parser.add_argument_group("behaviour", "What the server does besides."), ServeConfig, *_BEHAVIOUR)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The validated settings of a parsed command line. InvalidValueError names the flag."""
    for name in _PARALLEL:
        if (size := vars(args)[name]) != 1:
            raise InvalidValueError(flag_of(name), size, "must be 1: one device serves a model")
    with named_by_flag(ServeConfig, Limits, HttpOptions, OmniDiffusionConfig):
        limits = Limits(**given(args, Limits))
        key = envs.api_key()
        http = HttpOptions(**{"api_key": (key,) if key else ()} | given(args, HttpOptions))
        bounds = {"max_inference_steps": limits.max_steps, "max_image_pixels": limits.max_pixels}
        engine = engine_args(args) | bounds
        return ServeConfig(engine_args=engine, limits=limits, http=http, **given(args, ServeConfig))


def uvicorn_options(args: argparse.Namespace) -> dict[str, Any]:
    """What uvicorn is told, as vLLM tells it."""
    names: tuple[str, ...] = (
        "host",
        "port",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "enable_ssl_refresh",
    )
    names += ("h11_max_incomplete_event_size", "h11_max_header_count")
    options = {name: vars(args)[name] for name in names}
    if args.ssl_ciphers:
        options["ssl_ciphers"] = args.ssl_ciphers
    return options | {
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": 5,
        "timeout_graceful_shutdown": 5,  # all is answered by then; who does not read it does not hold up the end
        "server_header": False,
        "log_config": None,  # its lines go where ours go
    }


async def _serve(config: ServeConfig, options: dict[str, Any], launch: Launch | None) -> int:
    from vllm_omni.entrypoints.openai.app import build_app

    http = config.http
    try:
        sock = _vllm_compat.listen(http.host, http.port, http.uds)
    except OSError as error:
        flag, where = ("--uds", http.uds) if http.uds else ("--port", f"{http.host}:{http.port}")
        raise InvalidValueError(flag, where, f"cannot be used ({error.strerror})") from None
    _vllm_compat.adopt_logging(JsonLines() if config.log_json else None)
    logger.info("serving %s: %s", config.model_names[0], json.dumps(config.engine_args, default=str))
    engine = ProcessEngineClient(
        config.engine_args,
        max_queued_requests=config.limits.max_queued_requests,
        warmup=config.warmup,
        log_json=config.log_json,
        launch=launch,
    )

    async def stop() -> None:
        await engine.drain(config.shutdown_timeout_s)
        await engine.shutdown()  # what has not ended is told so: the server waits for its replies

    try:
        await engine.start()
        app = build_app(engine, config)
        gc.collect()
        gc.freeze()  # what is imported stays: looking through it again holds up every reply for tenths of a second
        await _vllm_compat.serve_http(app, sock, stop, config.shutdown_timeout_s, **options)
    finally:
        await engine.shutdown()
    return 0
