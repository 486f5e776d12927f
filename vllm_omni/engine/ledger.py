"""Counters and costs over all engine processes of a client. Numbers only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_omni.cache_names import is_off
from vllm_omni.engine import cost
from vllm_omni.engine.interface import EngineLoad, EngineStats
from vllm_omni.engine.wire import StatsReport, UnitCosts
from vllm_omni.errors import DeadlineExceededError, EngineClosedError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

_COUNTERS = (
    "steps_computed",
    "steps_skipped",
    "forwards_computed",
    "forwards_skipped",
    "aborts_by_stage",
    "batch_sizes",
    "prompt_hits",
    "prompt_misses",
    "queue_wait_s",
    "denoise_s",
    "decode_s",
)


@dataclass(frozen=True)
class RequestSize:
    """The size of a request, as far as it is known before the engine has seen it."""

    pixels: int
    steps: int  # times the pictures that share them
    computed: float | None = None  # the share of them that its cache computes; None: as others of late

    @classmethod
    def of(cls, params: OmniDiffusionSamplingParams, defaults: Mapping[str, Any]) -> RequestSize:
        """The size of a request, where a model has `defaults` for what it leaves out."""
        height, width = (vars(params)[name] or defaults.get(name) or 0 for name in ("height", "width"))
        steps = params.num_inference_steps or defaults.get("num_inference_steps") or 50
        asked, share = params.cache, None
        if is_off(asked):
            share = 1.0
        elif isinstance(asked, Mapping):  # what is wrong with it, the engine says
            speedup, nfe = asked.get("speedup"), asked.get("nfe")
            if isinstance(speedup, int | float) and speedup >= 1:
                share = 1 / speedup
            elif isinstance(nfe, int) and nfe > 0:
                share = min(1.0, nfe / steps)
        return cls(height * width, steps * params.num_outputs_per_prompt, share)


class Ledger:
    """Counters survive an engine process; gauges are its own."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._stats, self._before = EngineStats(), EngineStats()  # of the present process, and of those before it
        self.costs = cost.no_costs()
        self._jobs: dict[str, tuple[float, int]] = {}  # as last reported
        self._promised = 0.0  # when the last request that was refused may come back

    def note(self, report: StatsReport) -> None:
        self._stats = report.stats
        self._jobs = report.jobs if report.costs.computed else {}  # one that has measured nothing cannot plan
        self.costs = report.costs if report.costs.computed else self.costs

    def assume(self, costs: UnitCosts) -> None:
        """Take what another engine has measured, until this one has measured something."""
        if not self.costs.computed:
            self.costs = costs

    def process_ended(self) -> None:
        """Keep what it counted; nothing runs any more."""
        self._before = replace(self._before, **self._sums())
        self._stats, self._jobs = EngineStats(recent=self._stats.recent), {}

    def calm(self) -> None:
        """Note that nothing is in flight: there is room for whoever comes back."""
        self._promised = 0.0

    def stats(self, in_flight: Collection[RequestSize]) -> EngineStats:
        """Counters since the beginning, gauges as of the last report, bounded by what is in flight."""
        running = min(self._stats.running, len(in_flight))
        return replace(
            self._stats,
            **self._sums(),
            running=running,
            waiting=len(in_flight) - running,
            requests=dict(self.outcomes),
            queued_cost_s=self._queued_cost(in_flight),
        )

    def retry_after_s(self, in_flight: Collection[RequestSize]) -> float:
        """Seconds until there should be room for one more that is refused now, at least one."""
        now, queued = time.monotonic(), self._queued_cost(in_flight)
        self._promised = cost.come_back(now, self._promised, queued / max(1, len(in_flight)), queued)
        return max(1.0, self._promised - now)

    def report(self, stats: EngineStats, in_flight: Mapping[str, RequestSize]) -> StatsReport:
        """All of it, for a front elsewhere."""
        jobs = {name: self._jobs.get(name) or (self.seconds(size), size.pixels) for name, size in in_flight.items()}
        return StatsReport(stats, self.costs, jobs)

    def load(self, in_flight: Mapping[str, RequestSize]) -> EngineLoad:
        """What is in flight, by name: as last reported, or, of what the engine had not seen then, as planned."""
        jobs = (self._jobs.get(name) or (self.seconds(size), size.pixels) for name, size in in_flight.items())
        return EngineLoad(tuple(jobs), self.costs.unshared)

    def seconds(self, size: RequestSize) -> float:
        """What a new request would take if it had the engine to itself."""
        return cost.planned_seconds(cost.by_itself(self.costs), *self._need(size))

    def _need(self, size: RequestSize) -> tuple[int, float, float, float]:
        share = self.costs.cached_share if size.computed is None else size.computed
        return size.pixels, size.steps * share, size.steps * (1 - share), 1.0

    def _queued_cost(self, in_flight: Collection[RequestSize]) -> float:
        """Planned seconds of all that is in flight: as last reported, and of what the engine had not seen then."""
        if not in_flight:
            return 0.0
        unseen = len(in_flight) - self._stats.running - self._stats.waiting
        newest = list(in_flight)[-unseen:] if unseen > 0 else []
        return self._stats.queued_cost_s + cost.total(self.costs, map(self._need, newest))

    def _sums(self) -> dict[str, Any]:
        return {name: _sum(vars(self._before)[name], vars(self._stats)[name]) for name in _COUNTERS}


def outcome(error: Exception | None) -> str:
    """The word under which an ended request is counted."""
    if error is None:
        return "finished"
    if isinstance(error, RequestAbortedError | EngineClosedError):
        return "aborted"
    return "expired" if isinstance(error, DeadlineExceededError) else "failed"


def _sum(one: Any, other: Any) -> Any:
    return dict(Counter(one) + Counter(other)) if isinstance(one, dict) else one + other
