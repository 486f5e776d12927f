"""A simulated front: routing rules, engines that die, autoscaling, and the events of all engines in order of time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from simulator.engine import Costs, Engine, Job, Work
from vllm_omni.replicas.routing import LOOKED_AT, MOST_AGAIN, Asked, Load, choose
from vllm_omni.replicas.scaling import Window, wanted_replicas

Choice = Callable[[Sequence[Load], Asked, random.Random], int | None]


class RoundRobin:
    def __init__(self) -> None:
        self._turn = count()

    def __call__(self, loads: Sequence[Load], asked: Asked, draw: random.Random) -> int | None:
        able = [index for index, load in enumerate(loads) if load.able]
        return able[next(self._turn) % len(able)] if able else None


def least(of: Callable[[Load], float]) -> Choice:
    """The replica that has least of something, one at random of several."""

    def rule(loads: Sequence[Load], asked: Asked, draw: random.Random) -> int | None:
        able = [index for index, load in enumerate(loads) if load.able]
        return min(able, key=lambda index: (of(loads[index]), draw.random()), default=None)

    return rule


RULES: dict[str, Callable[[], Choice]] = {
    "round-robin": RoundRobin,
    "least count": lambda: least(lambda load: len(load.jobs)),
    "least queued seconds": lambda: least(lambda load: sum(seconds for seconds, _ in load.jobs)),
    "least added delay": lambda: choose,
}


@dataclass(frozen=True)
class Scaling:
    """Every `every` seconds as many replicas as the signal asks for; those that leave end what they have."""

    signal: str  # "seconds" or "count", of what is in flight, per replica
    target: float
    lowest: int
    highest: int
    every: float = 10.0
    patience: float = 120.0  # one leaves if so long none of that many was wanted


@dataclass
class Front:
    """A simulation: engines, events, and the one front that routes. `run` returns the jobs as they ended."""

    costs: Costs
    replicas: int
    rule: Choice
    seed: int = 0
    mean_life: float = math.inf  # seconds until an engine dies
    scaling: Scaling | None = None
    again: Callable[[Job], tuple[float, Work] | None] = lambda job: None  # in a closed loop: a pause, and what comes
    draw: random.Random = field(init=False)
    jobs: list[Job] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    line: list[tuple[float, int, Job]] = field(default_factory=list)  # those that wait for an engine, by their turns
    free: dict[Engine, None] = field(default_factory=dict)  # engines that would get one
    deaths: int = 0
    replica_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = count()
        self._window = Window(self.scaling.patience if self.scaling is not None else 0.0)
        self._open = 0  # requests to come or in flight
        self._routing = random.Random(self.seed + 1)

    def run(self, arrivals: Iterable[tuple[float, Work]]) -> list[Job]:
        for index in range(self.replicas):
            self.engines.append(Engine(self.costs, index))
            self._may_die(self.engines[index], 0.0)
            self._note(self.engines[index])
        for time, work in arrivals:
            self._open += 1
            self._at(time, "arrives", work)
        if self.scaling is not None:
            self._at(self.scaling.every, "scale", None)
        clock = 0.0
        while self._open and self._events:
            now, _, what, about = heapq.heappop(self._events)
            self.replica_seconds += (now - clock) * sum(1 for one in self.engines if one.up or not one.leaving)
            clock = now
            if what == "arrives":
                self._place(self._job(about, now), now)
            elif what == "ends" and about[1] == about[0].version:
                self._ended(about[0], now)
            elif what == "dies":
                self._dies(about, now)
            elif what == "starts":
                about.up, about.clock = True, now
                self._may_die(about, now)
                self._note(about)
                self._move(now)
            elif what == "scale":
                self._scale(now)
        return self.jobs

    def _at(self, time: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), what, about))

    def _job(self, work: Work, now: float) -> Job:
        job = Job(work, now, work.seconds(self.costs))
        self.jobs.append(job)
        return job

    def _place(self, job: Job, now: float) -> None:
        heapq.heappush(self.line, (job.turn, next(self._order), job))
        self._move(now)

    def _move(self, now: float) -> None:
        """Send those that wait where the rule says, as far as there are places; of many engines it looks at some."""
        while self.line and self.free:
            engines = list(self.free)
            if len(engines) > LOOKED_AT:
                engines = self._routing.sample(engines, LOOKED_AT)
            job = self.line[0][2]
            asked = Asked(job.seconds, job.work.pixels)
            index = self.rule([engine.load(now) for engine in engines], asked, self._routing)
            assert index is not None
            heapq.heappop(self.line)
            job.taken += 1
            engines[index].advance(now)
            engines[index].add(job)
            self._expect(engines[index])

    def _expect(self, engine: Engine) -> None:
        """Note when its next request ends, and whether it would get another one."""
        self._note(engine)
        engine.version += 1
        if engine.running:
            self._at(engine.next_end(), "ends", (engine, engine.version))

    def _note(self, engine: Engine) -> None:
        if engine.free:
            self.free[engine] = None
        else:
            self.free.pop(engine, None)

    def _ended(self, engine: Engine, now: float) -> None:
        engine.advance(now)
        for job in engine.finish():
            self._close(job, now)
        if engine.leaving and not engine.running:
            engine.up = False
        self._expect(engine)
        self._move(now)

    def _close(self, job: Job, now: float) -> None:
        job.ended = now
        self._open -= 1
        if (following := self.again(job)) is not None:
            self._open += 1
            self._at(now + following[0], "arrives", following[1])

    def _may_die(self, engine: Engine, now: float) -> None:
        if self.mean_life < math.inf:
            self._at(now + self.draw.expovariate(1 / self.mean_life), "dies", engine)

    def _dies(self, engine: Engine, now: float) -> None:
        if not engine.up:
            return
        self.deaths += 1
        engine.up = False
        engine.version += 1
        lost = engine.lose()
        self._note(engine)
        if not engine.leaving:
            self._at(now + self.costs.start, "starts", engine)
        for job in lost:
            if job.taken > MOST_AGAIN:
                job.failed = True
                self._close(job, now)
            else:
                self._place(job, now)

    def _scale(self, now: float) -> None:
        plan = self.scaling
        assert plan is not None
        staying = [one for one in self.engines if not one.leaving]
        flight = [one for one in self.engines if one.up or not one.leaving]
        waiting = [job for _, _, job in self.line]
        if plan.signal == "count":
            left = float(sum(len(one.told) for one in flight) + len(waiting))
        else:
            left = sum(one.left for one in flight) + sum(job.seconds for job in waiting)
        wanted = wanted_replicas(left, plan.target, plan.lowest, plan.highest)
        for _ in range(wanted - len(staying)):
            engine = Engine(self.costs, len(self.engines), clock=now, up=False)
            self.engines.append(engine)
            self._at(now + self.costs.start, "starts", engine)
        most = self._window.note(now, wanted)
        for engine in sorted(staying, key=lambda one: len(one.told))[: max(0, len(staying) - most)]:
            engine.leaving = True
            engine.up = engine.up and bool(engine.running)
            self._note(engine)
        self.engines = [one for one in self.engines if one.up or not one.leaving]
        self._at(now + plan.every, "scale", None)
