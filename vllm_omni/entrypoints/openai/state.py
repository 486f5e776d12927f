"""What every route needs: the engine, the settings, the jobs that run, and what was counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256

from fastapi import Request

from vllm_omni.engine.interface import EngineClient, ModelInfo
from vllm_omni.entrypoints.openai.jobs import Jobs
from vllm_omni.entrypoints.openai.order import Order
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@dataclass
class Served:
    """One application's state; all of it belongs to one event loop."""

    engine: EngineClient
    config: ServeConfig
    jobs: Jobs
    started: float = field(default_factory=time.time)
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: Counter[float] = field(default_factory=Counter)  # upper bound -> replies
    latency_sum: float = 0.0

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds of a reply that came."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.latency_sum += seconds
        self.latencies[next((bound for bound in LATENCY_BOUNDS if seconds <= bound), float("inf"))] += 1

    def note(self, request: Request, order: Order) -> None:
        """One log line for an accepted order; prompts only where they were asked for."""
        user = order.fields.safety_identifier or order.fields.user
        told = {
            "request_id": request.state.request_id,
            "size": order.size,
            "n": len(order.params),
            "steps": order.steps,
            "prompt_characters": len(order.fields.prompt),
            "user": sha256(user.encode()).hexdigest()[:12] if user else None,
        }
        if self.config.log_prompts:
            told["prompt"] = order.fields.prompt
        logger.info("accepted %s", {k: v for k, v in told.items() if v is not None}, extra=told)


def served(request: Request) -> Served:
    """The state of the application that a request came to."""
    state: Served = request.app.state.served
    return state
