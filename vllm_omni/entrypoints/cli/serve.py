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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni import _vllm_compat, envs
from vllm_omni.diffusion.cache.selector import canonical_name
from vllm_omni.diffusion.cache.settings import PRESET_NAMES
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.loader import resolve_model
from vllm_omni.engine.client import ProcessEngineClient, launch_engine
from vllm_omni.engine.supervisor import Launch
from vllm_omni.entrypoints.cli.main import json_object
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import JsonLines, init_logger

logger = init_logger(__name__)

USAGE = "vllm serve MODEL --omni [options]   |   vllm-omni serve MODEL [options]"
EPILOG = """all flags: --help=all; one group or flag: --help=engine, --help=limits, --help=max-num-seqs

examples:
  vllm serve demo --omni --cache-backend magcache                the model that comes with the package
  vllm serve MODEL --omni --cache-backend magcache --cache-config fast
  vllm serve MODEL --omni --cache-backend magcache --cache-config '{"speedup": 2.0}'
  vllm serve MODEL --omni --host 0.0.0.0 --api-key SECRET --max-num-seqs 32 --ui
then, with the official client:
  OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any").images.generate(prompt="red apple")
"""

# Flags of other engines that exist, and mean something that this one does not do.
_PARALLEL = ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree", "ring_degree", "data_parallel_size")


def run_serve(words: Sequence[str]) -> int:
    """Serve until a signal ends it."""
    hide_keys(words)
    _vllm_compat.require()
    early = refuse_early(words)
    launch = launch_engine(early.engine_args, warmup=early.warmup, log_json=early.log_json) if early else None
    try:  # vLLM is imported from here on, and the engine loads meanwhile
        args = build_parser().parse_args(list(words))
        config = serve_config(args)
        resolve_model(str(config.engine_args["model"]))
        return asyncio.run(_serve(config, uvicorn_options(args), launch))
    finally:
        if launch is not None:
            launch.discard()


def build_parser() -> argparse.ArgumentParser:
    """vLLM's parser and server flags, and ours."""
    parser = _vllm_compat.make_parser(
        prog="vllm serve",
        usage=USAGE,
        description="Serve a diffusion transformer behind the OpenAI Images API, with an activation cache per request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="'demo' (shipped), a diffusers model folder, or a hub id")
    parser.add_argument("--omni", action="store_true", help="tells vLLM that this is a diffusion model")
    _add_own(parser)
    _vllm_compat.add_frontend_flags(parser)
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

    What our flags say; None where they may not be all, or where nothing will be served.
    """
    parser = argparse.ArgumentParser(prog="vllm serve", usage=USAGE, add_help=False, allow_abbrev=False)
    _add_own(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds")
    parser.add_argument("--config")
    dashed = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    given, _ = parser.parse_known_args(dashed)  # the rest is vLLM's: its flags, their values, `--config FILE`
    named = bool(words) and not words[0].startswith("-")
    given.model = words[0] if named else "demo"
    resolve_model(given.model)
    config = ServeConfig(**_own_settings(given))
    help_asked = any(word == "-h" or word.startswith("--help") for word in words)
    if not (given.uds or given.config or help_asked):  # a file may name another port; it is read later
        _check_port(given.host, given.port)
    return None if given.config or help_asked or not named else config


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InvalidValueError("--port", f"{host}:{port}", f"cannot be used ({error.strerror})") from None


def _add_own(parser: argparse.ArgumentParser) -> None:
    _add_engine_flags(parser.add_argument_group("engine"))
    _add_limits(parser.add_argument_group("limits", "Checked before any work is done for a request."))
    _add_behaviour(parser.add_argument_group("behaviour"))


def _add_engine_flags(group: Any) -> None:
    add = group.add_argument
    add("--served-model-name", nargs="+", default=[], metavar="NAME", help="names for MODEL in the API; first: replies")
    add("--cache-backend", default="none", metavar="NAME", help="none (default), magcache, ...")
    add("--cache-config", metavar="JSON|PRESET", help=f"its settings, or one of: {', '.join(PRESET_NAMES)}")
    add("--max-num-seqs", type=int, default=16, help="requests in one batch (default 16)")
    add(
        "--max-queued-requests", "--max-num-queued-reqs", type=int, default=256, help="more are told to come back (256)"
    )
    add("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=True, help="do not compile (default)")
    add("--enable-cpu-offload", action="store_true", help="keep idle parts of the model in main memory")
    add("--vae-use-slicing", action="store_true", help="decode pictures one by one")
    add("--vae-use-tiling", action="store_true", help="decode large pictures in tiles")
    add("--lora-modules", nargs="+", default=[], metavar="NAME=PATH", help="adapters that requests may name")
    for name in _PARALLEL:
        add(f"--{name.replace('_', '-')}", type=int, default=1, help=argparse.SUPPRESS)


def _add_limits(group: Any) -> None:
    add = group.add_argument
    add("--max-n", type=int, default=10, help="pictures of one request (10)")
    add("--max-steps", type=int, default=200, help="denoising steps of one request (200)")
    add("--max-pixels", type=int, default=2048 * 2048, help="width x height of a picture (4194304)")
    add("--max-frames", type=int, default=257, help="frames of a video (257)")
    add("--max-prompt-characters", type=int, default=32_000, help="of a prompt (32000)")
    add("--max-body-mb", type=float, default=64.0, help="size of a request's body, in MiB (64)")
    add("--max-input-images", type=int, default=16, help="pictures sent with one request (16)")
    add("--max-input-pixels", type=int, default=64 * 2**20, help="of a picture sent with a request (67108864)")
    add("--request-timeout", type=float, default=600.0, metavar="SECONDS", help="longest time for one request (600)")


def _add_behaviour(group: Any) -> None:
    add = group.add_argument
    add("--ui", action="store_true", help="serve a small page to try the model, at /ui")
    add("--no-warmup", action="store_true", help="be ready without a first picture having been made")
    add("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help="wait for running requests at the end")
    add("--sse-keep-alive-interval", type=float, default=15.0, metavar="SECONDS", help="comments on quiet streams (15)")
    add("--allow-unknown-fields", action="store_true", help="ignore fields that the API does not have, do not refuse")
    add("--no-png-metadata", action="store_true", help="leave prompt, seed and settings out of PNG files")
    add(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="fetch pictures from these (none)",
    )
    add("--store-dir", metavar="FOLDER", help="where video jobs are kept (default: a temporary folder)")
    add("--log-json", action="store_true", help="one JSON object per log line")
    add("--log-prompts", action="store_true", help="write prompts into the log (never by default)")
    add("--otlp-traces-endpoint", metavar="URL", help="OpenTelemetry collector for traces")


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The validated settings of a parsed command line. InvalidValueError names the flag."""
    given = vars(args)
    lists = ("allowed_origins", "allowed_methods", "allowed_headers", "middleware")
    theirs: dict[str, Any] = {name: given[name] for name in ("host", "port", "uds", "allow_credentials")}
    theirs |= {name: tuple(given[name] or ()) for name in lists}
    return ServeConfig(
        root_path=args.root_path or "",
        api_keys=tuple(args.api_key or filter(None, [envs.api_key()])),
        fastapi_docs=not args.disable_fastapi_docs,
        **theirs,
        **_own_settings(args),
    )


def _own_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What our flags say, as arguments of `ServeConfig`."""
    given = vars(args)
    for name in _PARALLEL:
        if given[name] != 1:
            raise InvalidValueError(f"--{name.replace('_', '-')}", given[name], "must be 1: one device serves a model")
    backend = None if args.cache_backend in (None, "none") else canonical_name(args.cache_backend)
    engine = {
        "model": args.model,
        "cache_backend": backend or "none",
        "cache_config": _cache_config(args.cache_config),
        "lora_modules": _lora_modules(args.lora_modules),
        "max_inference_steps": args.max_steps,
        "max_image_pixels": args.max_pixels,
    }
    same = ("dtype", "device", "revision", "max_num_seqs", "enforce_eager", "enable_cpu_offload")
    engine |= {name: given[name] for name in (*same, "vae_use_slicing", "vae_use_tiling")}
    plain: tuple[str, ...] = ("max_queued_requests", "max_n", "max_steps", "max_pixels", "max_frames")
    plain += ("max_prompt_characters", "max_body_mb", "max_input_images", "max_input_pixels")
    plain += ("allow_unknown_fields", "log_prompts", "log_json", "otlp_traces_endpoint", "ui")
    return {name: given[name] for name in plain} | {
        "engine_args": engine,
        "served_model_names": tuple(args.served_model_name),
        "allowed_media_domains": tuple(args.allowed_media_domains),
        "warmup": not args.no_warmup,
        "shutdown_timeout_s": args.shutdown_timeout,
        "request_timeout_s": args.request_timeout,
        "sse_keep_alive_s": args.sse_keep_alive_interval,
        "png_metadata": not args.no_png_metadata,
        "store_dir": Path(args.store_dir) if args.store_dir else None,
    }


def _cache_config(text: str | None) -> dict[str, Any] | None:
    """A preset's name or a JSON object, as plain data; checked here, so that a typo costs no model load."""
    if text is None:
        return None
    settings = {"preset": text} if text in PRESET_NAMES else json_object("--cache-config", text)
    config = DiffusionCacheConfig.from_dict(settings or {})
    if config.profile is not None:
        from vllm_omni.diffusion.cache.profile import named_profile

        named_profile(config.profile)
    return settings


def _lora_modules(entries: Sequence[str]) -> dict[str, str]:
    modules = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise InvalidValueError("--lora-modules", entry, "must be NAME=PATH, e.g. ink=/models/ink.safetensors")
        modules[name] = path
    return modules


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

    try:
        sock = _vllm_compat.listen(config.host, config.port, config.uds)
    except OSError as error:
        where = config.uds or f"{config.host}:{config.port}"
        raise InvalidValueError(
            "--uds" if config.uds else "--port", where, f"cannot be used ({error.strerror})"
        ) from None
    _vllm_compat.adopt_logging(JsonLines() if config.log_json else None)
    logger.info("serving %s: %s", config.model_names[0], json.dumps(config.engine_args, default=str))
    engine = ProcessEngineClient(
        config.engine_args,
        max_queued_requests=config.max_queued_requests,
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
