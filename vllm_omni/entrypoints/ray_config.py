"""The settings of an application on Ray Serve. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from vllm_omni.entrypoints.serve_config import HttpOptions, Limits, ServeConfig, http_options, with_calibration
from vllm_omni.errors import InvalidValueError
from vllm_omni.settings import Settings

_SERVE_LISTENS = (
    "is a setting of Ray Serve itself: `http_options` at the top of its config file, or `serve start --http-host HOST "
    "--http-port PORT`, and not one of the application's args"
)


class RayOptions(Settings):
    """How many engines there are, and what each of them takes of the cluster."""

    replicas: int = Field(default=1, ge=1, description="engines at the start, and at least")
    max_replicas: int | None = Field(
        default=None, ge=1, description="most engines, started when work queues up (default: as many as at the start)"
    )
    target_queued_s: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="seconds of work of each engine before another starts"
    )
    downscale_delay_s: float = Field(
        default=300.0, ge=0, allow_inf_nan=False, description="seconds of low demand before an engine ends"
    )
    cpus_per_replica: float = Field(default=1.0, ge=0, description="processors that Ray reserves for an engine")
    gpus_per_replica: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for an engine")

    @model_validator(mode="after")
    def _bounds(self) -> RayOptions:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            fix = f"must be at least replicas, {self.replicas}"
            raise InvalidValueError("max_replicas", self.max_replicas, fix)
        return self


class RayConfig(Settings):
    """An application: what `serve run` and the `args` of a Serve config file take, as plain data."""

    model: str = Field(min_length=1)
    engine_args: dict[str, Any] = Field(default_factory=dict)  # the others of `OmniDiffusionConfig`
    options: RayOptions = RayOptions()
    limits: Limits = Limits()
    http: HttpOptions = HttpOptions()
    allowed_hosts: tuple[str, ...] = ()  # names by which clients may call; as `--allowed-hosts`
    served_model_name: tuple[str, ...] = ()
    warmup: bool = True
    shutdown_timeout_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)

    def serve_config(self) -> ServeConfig:
        """The settings of the HTTP application, checked."""
        bounds = {"max_inference_steps": self.limits.max_steps, "max_image_pixels": self.limits.max_pixels}
        return ServeConfig(
            engine_args={"model": self.model} | bounds | with_calibration(self.engine_args),
            limits=self.limits,
            http=self.http,
            allowed_hosts=self.allowed_hosts,
            served_model_name=self.served_model_name,
            warmup=self.warmup,
            shutdown_timeout_s=self.shutdown_timeout_s,
        )


def app_config(args: Mapping[str, Any]) -> RayConfig:
    """The settings of a Serve config file's `args`: fields of `RayConfig`, as plain data.

    From a command line, fields of `RayOptions` may stand beside `model`, and are texts. Where Serve listens is for its
    own settings to say and not known here: with a key any name of this server is answered, as on every interface,
    and without one those of this machine and of `allowed_hosts`. A key that is not given is that of VLLM_API_KEY.
    """
    http = args.get("http", {})
    if not isinstance(http, Mapping):
        raise InvalidValueError("http", http, "must hold fields of HttpOptions by name")
    for name in ("host", "port"):
        for field, given in ((name, args), (f"http.{name}", http)):
            if name in given:
                raise InvalidValueError(field, given[name], _SERVE_LISTENS)
    own = {name: value for name, value in args.items() if name in RayOptions.model_fields}
    rest = {name: value for name, value in args.items() if name not in own}
    if own:
        rest["options"] = RayOptions(**{**rest.get("options", {}), **own})
    options = http_options(http)
    if options.api_key:
        options = options.model_copy(update={"host": ""})  # not known here
    return RayConfig(**rest | {"http": options})
