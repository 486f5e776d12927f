"""The settings of a server: the engine's arguments, limits, switches. Knows no HTTP and no vLLM.

A field's description is the help text of its flag, and its default is written here alone (`cli/flags.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from vllm_omni import envs
from vllm_omni.diffusion.cache.settings import engine_backend
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.scheduler import AGEING_S
from vllm_omni.engine.interface import MAX_QUEUED_REQUESTS
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import MAX_PROMPT_CHARACTERS
from vllm_omni.settings import Settings


class Limits(Settings):
    """The most that a request may ask for, checked before any work is done for it, and how many requests may wait."""

    max_n: int = Field(default=10, ge=1, le=64, description="pictures or videos of one request")
    max_steps: int = Field(default=200, ge=1, le=1000, description="denoising steps of one request")
    max_pixels: int = Field(default=2048 * 2048, ge=1, description="width x height of a picture")
    max_frames: int = Field(default=257, ge=1, description="frames of a video")
    max_seconds: float = Field(default=400.0, gt=0, description="seconds of a sound")
    max_prompt_characters: int = Field(
        default=MAX_PROMPT_CHARACTERS, ge=1, le=MAX_PROMPT_CHARACTERS, description="characters of a prompt"
    )
    max_body_mb: float = Field(default=64.0, gt=0, allow_inf_nan=False, description="a request's body, in MiB")
    max_json_mb: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="JSON or a plain form, without the pictures in it, in MiB",
    )
    max_input_images: int = Field(default=16, ge=1, description="pictures sent with one request")
    max_input_pixels: int = Field(
        default=32 * 2**20, ge=1, description="width x height of the pictures sent with one request, together"
    )
    request_timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False, description="longest time of a request")
    max_connections: int = Field(default=1024, ge=8, description="open connections; descriptors may allow fewer")
    client_timeout_s: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        description="how long a client may neither send its request nor read its reply",
    )
    max_priority: int = Field(
        default=2,
        ge=0,
        description="levels by which a request may go before or after others, each worth 5 s",
    )
    max_queued_requests: int = Field(
        default=MAX_QUEUED_REQUESTS, ge=0, description="requests that may wait; further ones get a 503 with Retry-After"
    )

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_json_bytes(self) -> int:
        return int(self.max_json_mb * 2**20)

    @property
    def most_priority(self) -> int:
        """Never beyond the request time-out: nobody waits that long for those who come later."""
        return min(self.max_priority, int(self.request_timeout_s / AGEING_S))


class HttpOptions(Settings):
    """How the server listens and whom it answers. The fields are those of vLLM's own server flags, by their names."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    uds: str | None = None
    root_path: str = ""
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    middleware: tuple[str, ...] = ()
    disable_access_log_for_endpoints: str = ""  # paths, with commas between them
    disable_fastapi_docs: bool = False
    keep_alive_s: int = Field(default=5, ge=0)  # no flag: VLLM_HTTP_TIMEOUT_KEEP_ALIVE

    @model_validator(mode="after")
    def _keys(self) -> HttpOptions:
        if any(not key.strip() for key in self.api_key):
            raise InvalidValueError("api_key", "", "must not be blank; leave --api-key out to serve without one")
        return self

    @property
    def quiet_paths(self) -> frozenset[str]:
        """Addresses whose requests are not worth a line."""
        return frozenset(path.strip() for path in self.disable_access_log_for_endpoints.split(",")) - {""}


class ServeConfig(Settings):
    """Settings of the HTTP front end. Defaults are safe: loopback, no URL fetching, a limit for every number.

    `engine_args` are those of `OmniDiffusionConfig`; names that end in `_s` are seconds.
    """

    engine_args: dict[str, Any]
    limits: Limits = Limits()
    http: HttpOptions = HttpOptions()
    served_model_name: tuple[str, ...] = Field(
        default=(), description="names of the model in the API (default: its folder's); replies carry the first"
    )
    data_parallel_size: int = Field(
        default=1, ge=1, le=256, description="engines on this machine, each with the whole model, behind one address"
    )
    ui: bool = Field(default=False, description="serve a small page to try the model, at /ui")
    warmup: bool = Field(default=True, description="make one picture before the server is ready")
    shutdown_timeout_s: float = Field(
        default=30.0, ge=0, allow_inf_nan=False, description="how long running requests may take after SIGTERM"
    )
    sse_keep_alive_interval_s: float = Field(
        default=15.0, gt=0, allow_inf_nan=False, description="between two comments on a quiet stream"
    )
    allow_unknown_fields: bool = Field(default=False, description="ignore fields that the API does not have")
    png_metadata: bool = Field(default=True, description="write prompt, seed and settings into PNG files")
    allowed_media_domains: tuple[str, ...] = Field(
        default=(), description="hosts from which pictures may be fetched (default: none)"
    )
    allowed_model_folders: tuple[Path, ...] = Field(
        default=(), description="folders from which adapters and weights may be loaded over HTTP (default: none)"
    )
    profiler_dir: Path | None = Field(
        default=None, description="where traces of POST /start_profile are written (default: none are made)"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="names in the Host header that are answered (default: on loopback its own, else any)"
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(), description="addresses of proxies whose X-Forwarded-For is believed (default: none)"
    )
    store_dir: Path | None = Field(default=None, description="where video jobs are kept (default: a temporary folder)")
    log_stats: bool = Field(default=False, description="log a line about running and waiting requests and speed")
    log_stats_interval_s: float = Field(
        default=10.0, gt=0, allow_inf_nan=False, description="between two such lines, while there is something to do"
    )
    log_json: bool = Field(default=False, description="log one JSON object per line")
    log_prompts: bool = Field(default=False, description="write prompts into the log, also those that errors repeat")
    otlp_traces_endpoint: str | None = Field(default=None, description="OpenTelemetry collector for traces")

    @model_validator(mode="after")
    def _engine(self) -> ServeConfig:
        for name in self.engine_config().lora_modules:
            if name in self.model_names:
                raise InvalidValueError("lora_modules", name, "must not name an adapter as the model is named")
        return self

    def engine_config(self) -> OmniDiffusionConfig:
        """The engine's arguments, checked."""
        return OmniDiffusionConfig(**self.engine_args)

    @property
    def places(self) -> int:
        """Requests that may run or wait."""
        return self.data_parallel_size * self.engine_config().max_num_seqs + self.limits.max_queued_requests

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use; the first is the one in replies. A path never leaves the server."""
        if self.served_model_name:
            return self.served_model_name
        model = str(self.engine_args["model"])
        return (Path(model).name if Path(model).expanduser().is_dir() else model,)


def imported(name: str) -> Any:
    """What `--middleware` names: an ASGI class, or a function of request and call_next. InvalidValueError if none."""
    module, _, attribute = name.rpartition(".")
    try:
        if all(part.isidentifier() for part in name.split(".")) and module:
            return vars(import_module(module))[attribute]
        why = "it is not MODULE.NAME"
    except ImportError as error:
        why = str(error)
    except KeyError:
        why = f"{module} has no {attribute}"
    raise InvalidValueError("middleware", name, f"cannot be imported ({why})")


def http_options(given: Mapping[str, Any]) -> HttpOptions:
    """The options that are given; what is not, as the environment has it."""
    key, keep_alive_s = envs.api_key(), envs.http_keep_alive_s()
    found = {} if keep_alive_s is None else {"keep_alive_s": keep_alive_s}
    return HttpOptions(**{"api_key": (key,) if key else (), **found, **given})


def with_calibration(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's arguments as a server has them: a checkpoint without a profile does not stop it, but is learnt."""
    cache = engine_args.get("cache_config") or {}
    if engine_backend(engine_args.get("cache_backend")) != "magcache" or not isinstance(cache, Mapping):
        return dict(engine_args)
    return {**engine_args, "cache_config": {"calibrate": "auto", **cache}}
