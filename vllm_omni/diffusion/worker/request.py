"""A running request: its coroutine, its cache, the call it waits at, and its times. Owned by the runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.diffusion.cache.base import StackBackend
from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.settings import CacheSettings
from vllm_omni.diffusion.cache.state import CacheState, Forecast, Signal
from vllm_omni.diffusion.denoiser.step_tracker import StepPosition, StepTracker
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker.coroutine import ComponentCall, DenoiserCall, Failed, Finished, PipelineTask
from vllm_omni.diffusion.worker.shared_modules import OwnChanges
from vllm_omni.inputs.lora import Adapters
from vllm_omni.kernels.timing import Timings

PlanOf = Callable[[Schedule], CachePlan | None]  # None: every step computes


@dataclass(frozen=True)
class ParkedCall:
    """The call at which a request waits, and what is decided of it. Replaced as a whole, never changed."""

    call: DenoiserCall | ComponentCall
    key: Hashable  # calls with equal keys, and of one kind, can be made as one
    kind: StepKind
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 0
    signal: Signal | None = None  # what its gate must see before the step is decided
    forecast: Forecast | None = None


@dataclass
class Previews:
    """The pictures of a run that is not done: of every n-th step, as soon as they are asked for."""

    every: int | None = None
    due: tuple[int, Any, Any] | None = None  # step, model output and sample
    images: list[Any] | None = None

    def observe(self, step: int, model_output: Any, sample: Any) -> None:
        """Take in a step that ends, if a preview of it is due."""
        if self.every and (step + 1) % self.every == 0:
            self.due = step, model_output, sample

    def take(self) -> list[Any]:
        """The latest pictures, once."""
        images, self.images = self.images or [], None
        return images


@dataclass
class Request:
    """A running request. Without a cache its `cache` is a state in which every step computes."""

    request_id: str
    task: PipelineTask
    backend: StackBackend | None
    settings: CacheSettings | None
    tracker: StepTracker
    adapters: Adapters = ()
    plan_of: PlanOf | None = None  # a trial's: what its cache does, whatever the settings
    times: Timings = field(default_factory=Timings)
    previews: Previews = field(default_factory=Previews)
    cache: CacheState = field(default_factory=CacheState)
    changes: OwnChanges = field(default_factory=OwnChanges)
    schedule: Schedule | None = None
    position: StepPosition | None = None  # of the last denoiser call
    parked: ParkedCall | None = None
    ended: Finished | Failed | None = None
    text_tokens: int = 0
    shared_content: dict[int, Any] = field(default_factory=dict)  # of arguments that neighbours must share, hashed once
    size: Hashable = None  # by which `Pace` knows it

    def __post_init__(self) -> None:
        self.tracker.observe = self._observe

    def _observe(self, model_output: Any, sample: Any) -> None:
        self.previews.observe(self.step, model_output, sample)

    @property
    def step(self) -> int:
        """The step it is at; 0 before the first."""
        return self.position.step if self.position is not None else 0

    @property
    def plan(self) -> tuple[bool, ...] | None:
        """Which steps compute, if that is known before they run."""
        return self.cache.plan.compute if self.cache.plan is not None else None

    @property
    def call(self) -> DenoiserCall | ComponentCall:
        assert self.parked is not None
        return self.parked.call

    def end(self, event: Finished | Failed) -> None:
        """Give back every byte that the request holds; what it has counted stays."""
        self.ended, self.parked = event, None
        self.cache.drop()
        self.tracker.stop()
        self.tracker.observe = None  # no cycle keeps a tensor until a garbage collection
        self.task.release()
        self.shared_content.clear()
        self.changes.entries.clear()
        self.times.ended = time.perf_counter()
