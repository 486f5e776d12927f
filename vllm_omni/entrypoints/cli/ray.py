"""`vllm-omni ray`: the server on Ray Serve, on this machine or in a cluster that is there."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli.engine_flags import MODEL, add_engine_flags, engine_args
from vllm_omni.entrypoints.cli.flags import add_flags, command_parser, given, named_by_flag
from vllm_omni.entrypoints.ray_config import RayConfig, RayOptions
from vllm_omni.entrypoints.serve_config import HttpOptions, Limits, ServeConfig, http_options
from vllm_omni.errors import OmniError
from vllm_omni.model_folder import resolve_model

DESCRIPTION = """Every engine is a replica of a deployment of Ray Serve: Serve starts, watches
and replaces it, here or on another machine of a cluster, and one front with the
same HTTP API sends each request where it delays everybody least. Without
--address a Ray of its own is started, which listens on 127.0.0.1 alone."""
EXAMPLES = """
  vllm-omni ray demo --replicas 2 --cache-backend magcache
  vllm-omni ray MODEL --replicas 1 --max-replicas 8 --gpus-per-replica 1 --address auto --host 0.0.0.0 --api-key SECRET
"""
_PRIVATE = {  # of the Ray that is started here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes this machine's outer address for 127.0.0.1
    "RAY_SERVE_ENABLE_TASK_EVENTS": "0",
}


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Add the command with its options."""
    parser = command_parser(commands, "ray", summary, DESCRIPTION, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    replicas = parser.add_argument_group("replicas", "How many engines there are, and where.")
    add_flags(replicas, RayOptions)
    replicas.add_argument("--address", help="a cluster: 'auto', or host:port (default: a Ray of its own is started)")
    http = parser.add_argument_group("server", "Where it listens.")
    http.add_argument("--host", default=argparse.SUPPRESS, help="(default: 127.0.0.1)")
    http.add_argument("--port", type=int, default=argparse.SUPPRESS, metavar="N", help="(default: 8000)")
    http.add_argument("--api-key", nargs="+", default=argparse.SUPPRESS, metavar="KEY", help="default: VLLM_API_KEY")
    engine = parser.add_argument_group("engine", "The model, its cache and its batch.")
    add_flags(engine, ServeConfig, "served_model_name", "warmup", "shutdown_timeout_s")
    add_engine_flags(engine)
    add_flags(parser.add_argument_group("limits", "Checked before any work is done for a request."), Limits)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    config = ray_config(args)
    resolve_model(config.model)
    if find_spec("ray") is None:
        raise OmniError("Ray is not installed; pip install 'vllm-omni-magcache[ray]'")
    with tempfile.TemporaryDirectory(prefix="omni-ray-", ignore_cleanup_errors=True) as folder:
        return _serve(config, args.address, Path(folder))


def ray_config(args: argparse.Namespace) -> RayConfig:
    """The validated settings of a parsed command line. InvalidValueError names the flag."""
    with named_by_flag(RayOptions, Limits, HttpOptions, OmniDiffusionConfig, RayConfig):
        engine = engine_args(args)
        config = RayConfig(
            model=engine.pop("model"),
            engine_args=engine,
            options=RayOptions(**given(args, RayOptions)),
            limits=Limits(**given(args, Limits)),
            http=http_options(given(args, HttpOptions)),
            **{name: value for name, value in given(args, RayConfig).items() if name != "model"},
        )
        config.serve_config()
        return config


def _serve(config: RayConfig, address: str | None, folder: Path) -> int:
    if address is None:
        token = folder / "token"  # who has none cannot speak to this Ray, also on this machine
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        os.environ.update(_PRIVATE | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    import ray
    from ray import serve

    from vllm_omni.entrypoints.ray_serve import application

    if address is None:
        ray.init(**_own(config.options, folder))
    else:
        ray.init(address=address)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(http_options={"host": config.http.host, "port": config.http.port})
        serve.run(application(config), name="omni", route_prefix="/")
        print(f"serving {config.model} on http://{config.http.host}:{config.http.port}", flush=True)
        ended.wait()
    finally:
        if address is None:
            serve.shutdown()
        else:
            serve.delete("omni")  # others may serve there, too
        ray.shutdown()
    return 0


def _own(options: RayOptions, folder: Path) -> dict[str, Any]:
    """A Ray for this command: on loopback, with nothing outside its folder."""
    most = options.max_replicas or options.replicas
    return {
        "num_cpus": max(os.cpu_count() or 1, round(most * options.cpus_per_replica + 1)),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
        "object_store_memory": 256 * 2**20,
        "log_to_driver": True,
    }
