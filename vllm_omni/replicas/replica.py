"""One engine of a pool: what it has to do, what it lacks, and what was counted of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_omni.engine.interface import EngineClient, EngineLoad, EngineStats, ReplicaStats
from vllm_omni.engine.ledger import Ledger
from vllm_omni.engine.wire import Action
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.replicas.routing import Load


class ReplicaEngine(EngineClient, Protocol):
    """An `EngineClient` that says how busy it is."""

    async def start(self) -> object:
        """Return once its model is loaded."""

    @property
    def state(self) -> str:
        """The word of `ReplicaStats.state`: "ready", "asleep", "starting" or "dead"."""

    @property
    def ledger(self) -> Ledger:
        """What work costs there."""

    @property
    def load(self) -> EngineLoad:
        """What it has to do, with what was sent a moment ago."""

    def planned(self, params: OmniDiffusionSamplingParams) -> tuple[float, int]:
        """Seconds that a new request would take if it had the engine to itself, and its pixels."""


@dataclass(eq=False)
class Replica:
    """An engine and what the pool knows about it."""

    name: str
    engine: ReplicaEngine
    missed: deque[Action] = field(default_factory=deque)  # done to the others while it was starting
    catches_up: bool = False  # what it missed is being done
    coming: dict[Any, tuple[float, int]] = field(default_factory=dict)  # requests on their way to it, as jobs
    answered: int = 0
    lost: int = 0

    def forget(self, action: Action) -> None:
        """Take this very action, and none that is like it, off what it missed."""
        if places := [index for index, one in enumerate(self.missed) if one is action]:
            del self.missed[places[-1]]

    def behind(self, weights: Mapping[str, str]) -> bool:
        """Whether it has yet to do what was done to the others, or has weights other than `weights`."""
        return bool(self.missed) or self.engine.condition.weights != weights

    def able(self, weights: Mapping[str, str]) -> bool:
        return self.engine.ready and not self.behind(weights)

    def weighed(self) -> Load:
        """What `routing.choose` compares, of one that is able."""
        load = self.engine.load
        jobs = (*load.jobs, *self.coming.values())
        return Load(jobs, load.unshared, adapters=frozenset(self.engine.condition.adapters))

    @property
    def held(self) -> int:
        """Requests that it has, or is about to have."""
        return len(self.engine.load.jobs) + len(self.coming)

    def told(self, stats: EngineStats, weights: Mapping[str, str]) -> ReplicaStats:
        """What an operator sees of it."""
        state = self.engine.state
        return ReplicaStats(
            name=self.name,
            state="behind" if state == "ready" and self.behind(weights) else state,
            running=stats.running,
            waiting=stats.waiting,
            queued_cost_s=stats.queued_cost_s,
            answered=self.answered,
            lost=self.lost,
            restarts=stats.restarts,
            adapters=tuple(self.engine.condition.adapters),
        )
