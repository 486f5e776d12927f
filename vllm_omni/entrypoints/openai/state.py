"""What every route shares: the engine, the settings, the jobs that run, and what was counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from vllm_omni.engine.interface import EngineClient, ModelInfo
from vllm_omni.entrypoints.openai.generation import GenerationRequest
from vllm_omni.entrypoints.openai.jobs import Jobs, VideoJobs
from vllm_omni.entrypoints.openai.protocol.requests import BaseRequest
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@dataclass
class AppState:
    """One application's state; all of it belongs to one event loop."""

    engine: EngineClient
    config: ServeConfig
    jobs: Jobs
    videos: VideoJobs | None  # None for a model that makes pictures
    started: float = field(default_factory=time.time)
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: Counter[float] = field(default_factory=Counter)  # upper bound -> replies
    latency_sum: float = 0.0
    set_adapters: tuple[tuple[str, float], ...] = ()  # the last that were set for the whole server, with their scales
    merged: bool = False  # whether they still are
    missed: set[str] = field(default_factory=set)  # those of them that are not loaded any more

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    @property
    def adapters(self) -> Mapping[str, str]:
        """Those that requests may use: name -> where it came from."""
        return self.engine.condition.adapters

    @property
    def server_adapters(self) -> tuple[tuple[str, float], ...]:
        """Those, with scales, of requests that name none. One that has gone is logged, once."""
        if not self.merged:
            return ()
        missed = {name for name, _ in self.set_adapters if name not in self.adapters}
        for name in missed - self.missed:
            logger.error("adapter %s was set for all requests and is not loaded any more: they run without it", name)
        self.missed = missed
        return tuple(one for one in self.set_adapters if one[0] not in missed)

    def folder_of(self, adapter: str) -> str:
        """The last part of where an adapter came from: the rest is nobody's business."""
        return Path(self.adapters[adapter]).name

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds of a successful reply."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.latency_sum += seconds
        self.latencies[next((bound for bound in LATENCY_BOUNDS if seconds <= bound), float("inf"))] += 1

    def accept(self, http: Request, generation: GenerationRequest[Any], **more: str) -> None:
        """Write one log line; prompts only if the operator wants them."""
        asked = generation.request
        if not self.config.log_prompts:
            http.state.private = [text for text in (asked.prompt, asked.negative_prompt) if text]
        facts = {"model": generation.model, "size": generation.size, "n": len(generation.params)}
        http.state.facts |= facts
        user = generation.request.safety_identifier or generation.request.user
        told = {
            **facts,
            **more,
            "request_id": http.state.request_id,
            "steps": generation.steps,
            "frames": generation.params[0].num_frames,
            "prompt_characters": len(generation.request.prompt),
            "user": sha256(user.encode()).hexdigest()[:12] if user else None,
            "prompt": generation.request.prompt if self.config.log_prompts else None,
        }
        told = {name: value for name, value in told.items() if value is not None}
        logger.info("accepted %s", told, extra=told)


def salt_of(http: Request, request: BaseRequest) -> str:
    """Who asks: the key, and whom its owner asks for. What one of them has asked shows in nobody else's times."""
    who = http.headers.get("authorization", ""), request.safety_identifier or request.user or ""
    return sha256("\0".join(who).encode()).hexdigest()


async def _state(request: Request) -> AppState:
    state: AppState = request.app.state.omni
    return state


State = Annotated[AppState, Depends(_state)]
