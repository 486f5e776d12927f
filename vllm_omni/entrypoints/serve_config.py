"""What a server is told at start-up: limits, switches, and the engine's arguments. Knows no HTTP and no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.settings import Settings


class ServeConfig(Settings):
    """Settings of the HTTP front end. Defaults are safe: loopback, no URL fetching, a limit for every number.

    `engine_args` are those of `OmniDiffusionConfig`; sizes are in pixels, times in seconds, bodies in MiB.
    """

    engine_args: dict[str, Any]
    served_model_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    uds: str | None = None
    root_path: str = ""
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    middleware: tuple[str, ...] = ()
    fastapi_docs: bool = True
    warmup: bool = True
    max_queued_requests: int = Field(default=256, ge=0)
    shutdown_timeout_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    request_timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    sse_keep_alive_s: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    max_n: int = Field(default=10, ge=1, le=64)
    max_steps: int = Field(default=200, ge=1, le=1000)
    max_pixels: int = Field(default=2048 * 2048, ge=1)
    max_frames: int = Field(default=257, ge=1)
    max_prompt_characters: int = Field(default=32_000, ge=1)
    max_body_mb: float = Field(default=64.0, gt=0, allow_inf_nan=False)
    max_input_images: int = Field(default=16, ge=1)
    max_input_pixels: int = Field(default=64 * 2**20, ge=1)
    allow_unknown_fields: bool = False
    png_metadata: bool = True
    allowed_media_domains: tuple[str, ...] = ()
    log_prompts: bool = False
    log_json: bool = False
    otlp_traces_endpoint: str | None = None
    ui: bool = False
    store_dir: Path | None = None

    @model_validator(mode="after")
    def _engine(self) -> ServeConfig:
        self.engine_config()
        if self.api_keys and any(not key.strip() for key in self.api_keys):
            raise InvalidValueError("api_key", "", "must not be blank; leave --api-key out to serve without one")
        return self

    def engine_config(self) -> OmniDiffusionConfig:
        """The engine's arguments, checked."""
        return OmniDiffusionConfig(**self.engine_args)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use; the first is the one in replies. A path never leaves the server."""
        if self.served_model_names:
            return self.served_model_names
        model = str(self.engine_args["model"])
        return (Path(model).name if Path(model).expanduser().is_dir() else model,)
