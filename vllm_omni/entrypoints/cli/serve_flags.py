"""What `vllm serve --omni` and `vllm-omni serve` read from their command line, and how it becomes a `ServeConfig`.

vLLM's parser takes seconds to import, so that our own flags, the model's folder and the port are checked before.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence

from vllm_omni import _vllm_compat
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.distributed.config import ParallelConfig
from vllm_omni.entrypoints.cli.engine_flags import MODEL, add_engine_flags, engine_args
from vllm_omni.entrypoints.cli.flags import add_flags, flag_of, flags_of, given, named_by_flag, unknown_flags
from vllm_omni.entrypoints.cli.foreign_flags import ONE_DEVICE, PARALLEL, REFUSED
from vllm_omni.entrypoints.cli.serve_checks import check_config_files, check_needs, check_port
from vllm_omni.entrypoints.serve_config import HttpOptions, Limits, ServeConfig, http_options, with_calibration
from vllm_omni.errors import InvalidValueError, OmniError
from vllm_omni.model_folder import resolve_model

USAGE = "vllm serve MODEL --omni [options]   |   vllm-omni serve MODEL [options]"
DESCRIPTION = """Serve a model behind the OpenAI API for images and videos.

Requests of any size, number of steps and cache setting share one continuous
batch. The server listens on 127.0.0.1 unless --host says otherwise."""
EPILOG = """server flags, those of vLLM (--host, --port, --api-key, ...): --help=server
all flags: --help=all; one flag: --help=max-num-seqs

examples:
  vllm serve demo --omni --cache-backend magcache                the model that comes with the package
  vllm serve MODEL --omni --cache-backend magcache --cache-config fast
  vllm serve MODEL --omni --cache-backend magcache --cache-config '{"speedup": 2.0}'
  vllm serve MODEL --omni --data-parallel-size 4                 four engines, on four devices if there are
  vllm serve MODEL --omni --host 0.0.0.0 --api-key SECRET --max-num-seqs 32 --ui
then, with the official client:
  OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any").images.generate(prompt="red apple")
"""
_BEHAVIOUR = [name for name, field in ServeConfig.model_fields.items() if field.description]
_ENGINE = ["served_model_name", "data_parallel_size"]  # beside the engine's flags
_BEHAVIOUR = [name for name in _BEHAVIOUR if name not in _ENGINE]


def build_parser() -> argparse.ArgumentParser:
    """vLLM's parser and server flags, and ours."""
    parser = described(_vllm_compat.make_parser)
    _vllm_compat.add_frontend_flags(parser)
    return parser


def described(make: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """A parser of that kind with our flags and what the help says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = make(prog="vllm serve", usage=USAGE, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--omni", action="store_true", help="let vLLM hand the command over to this package")
    add_own_flags(parser)
    return parser


def refuse_early(words: Sequence[str]) -> ServeConfig | None:
    """Refuse what is wrong with the model's folder, our flags and files before vLLM is imported, which takes seconds.

    What our flags say; None if they may not be all, or if nothing will be served.
    """
    parser = argparse.ArgumentParser(prog="vllm serve", usage=USAGE, add_help=False, allow_abbrev=False)
    add_own_flags(parser)
    for name in ("host", "uds", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-ciphers"):
        parser.add_argument(f"--{name}")
    for name in ("port", "ssl-cert-reqs"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("middleware", "config"):
        parser.add_argument(f"--{name}", action="append")
    dashed = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    _check_names(dashed)
    args, _ = parser.parse_known_args(dashed)  # the rest is vLLM's: its flags, their values, `--config FILE`
    named = bool(words) and not words[0].startswith("-")
    args.model = words[0] if named else "demo"
    resolve_model(args.model)
    check_config_files(args.config or ())
    config = serve_config(args)
    help_asked = any(word.startswith("--help") for word in words)
    if not (config.http.uds or args.config or help_asked):  # a file may name another port; it is read later
        check_port(config.http.host, config.http.port)
    if args.config or help_asked or not named:
        return None
    check_needs(config, args)
    return config


def _check_names(words: Sequence[str]) -> None:
    """OmniError for a flag that is refused or that nobody knows."""
    names = [re.split("[=.]", word)[0] for word in words if word.startswith("--")]
    if (refused := next((name for name in names if name in REFUSED), None)) is not None:
        raise OmniError(f"{refused} {REFUSED[refused]}")
    if (message := unknown_flags(names, {*_known_flags(), *REFUSED})) is not None:
        raise OmniError(message)


def _known_flags() -> Iterator[str]:
    """Every flag that the whole parser will know, without vLLM."""
    yield from ("--help", "--config", "--omni")
    for name in [*_vllm_compat.FRONTEND_FLAGS, *PARALLEL]:
        yield from (flag_of(name), f"--no-{name.replace('_', '-')}")
    for others in PARALLEL.values():
        yield from others
    parser = argparse.ArgumentParser(add_help=False)
    add_own_flags(parser)
    yield from flags_of(parser)


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine, the limits and the server's behaviour."""
    engine = parser.add_argument_group("engine", "The model, its cache and its batch.")
    add_flags(engine, ServeConfig, *_ENGINE)
    add_engine_flags(engine)
    for name, others in PARALLEL.items():
        engine.add_argument(flag_of(name), *others, dest=name, type=int, default=1, help=argparse.SUPPRESS)
    add_flags(parser.add_argument_group("limits", "Checked before any work is done for a request."), Limits)
    add_flags(parser.add_argument_group("behaviour", "What the server does besides."), ServeConfig, *_BEHAVIOUR)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The validated settings of a parsed command line. InvalidValueError names the flag."""
    for name, size in vars(args).items():
        if name in PARALLEL and size != 1:
            raise InvalidValueError(flag_of(name), size, ONE_DEVICE)
    with named_by_flag(ServeConfig, Limits, HttpOptions, OmniDiffusionConfig, ParallelConfig):
        limits = Limits(**given(args, Limits))
        http = http_options(given(args, HttpOptions))
        bounds = {"max_inference_steps": limits.max_steps, "max_image_pixels": limits.max_pixels}
        engine = with_calibration(engine_args(args)) | bounds
        return ServeConfig(engine_args=engine, limits=limits, http=http, **given(args, ServeConfig))
