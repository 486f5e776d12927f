"""The engine of a server: one process, or several behind one front. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_omni.engine.client import ProcessEngineClient, launch_engine
from vllm_omni.engine.supervisor import Launch
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.replicas.pool import ReplicaPool, local_pool


def launch_engines(config: ServeConfig) -> list[Launch]:
    """Launch the processes of `make_engine`; they load while the front end does."""
    size = config.data_parallel_size
    return [launch_engine(config.engine_args, place=(index, size), **_options(config)) for index in range(size)]


def make_engine(config: ServeConfig, launches: Sequence[Launch] = ()) -> ProcessEngineClient | ReplicaPool:
    """The engine that a server of these settings has in front of it; not started yet."""
    waiting = config.limits.max_queued_requests
    if config.data_parallel_size == 1:
        launch = next(iter(launches), None)
        return ProcessEngineClient(config.engine_args, max_queued_requests=waiting, launch=launch, **_options(config))
    return local_pool(
        config.engine_args,
        config.data_parallel_size,
        max_queued_requests=waiting,
        launches=launches,
        **_options(config),
    )


def _options(config: ServeConfig) -> dict[str, Any]:
    return {"warmup": config.warmup, "log_json": config.log_json, "log_prompts": config.log_prompts}
