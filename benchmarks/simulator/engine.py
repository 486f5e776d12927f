"""One simulated engine: a batch in which sizes take turns, a queue, and what it reports. Knows no routing."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from vllm_omni.replicas.routing import Load

REPORT_EVERY_S = 0.25
AGEING_S = 5.0  # what a level of priority is worth: see diffusion/scheduler.py


@dataclass(frozen=True)
class Costs:
    """What work takes on one engine, in seconds: rows by pixels; `ends` is encoding and decoding."""

    row: dict[int, float]
    skipped: dict[int, float]
    ends: dict[int, float]
    unshared: float = 0.85
    places: int = 16
    start: float = 8.0  # from nothing to ready


class Work(NamedTuple):
    """A request: pixels, steps, the share of them that is computed, priority, and who asks (in a closed loop)."""

    pixels: int
    steps: int
    share: float
    priority: int = 0
    client: int = 0

    def seconds(self, costs: Costs) -> float:
        computed = round(self.steps * self.share)
        rest = (self.steps - computed) * costs.skipped[self.pixels]
        return computed * costs.row[self.pixels] + rest + costs.ends[self.pixels]


@dataclass(eq=False)
class Job:
    work: Work
    arrived: float
    seconds: float
    taken: int = 0
    ended: float = math.inf
    failed: bool = False

    @property
    def turn(self) -> float:
        """When it would have come, had all the same priority."""
        return self.arrived + self.work.priority * AGEING_S


@dataclass(eq=False)
class Engine:
    """One replica. Requests of one size advance alike, so each size has a clock of its own, and ends are known."""

    costs: Costs
    index: int
    clock: float = 0.0
    up: bool = True
    leaving: bool = False
    version: int = 0  # of the event that says when its next request ends
    turns: dict[int, float] = field(default_factory=dict)  # by pixels: seconds of work that each of them has got
    ends: dict[int, list[tuple[float, int, Job]]] = field(default_factory=dict)
    running: int = 0
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)
    told: dict[Job, float] = field(default_factory=dict)  # what is left of each, as last reported
    told_at: float = -math.inf
    order: Iterator[int] = field(default_factory=count)

    def _round(self) -> float:
        """Seconds in which each size has one forward."""
        d, row = self.costs.unshared, self.costs.row
        return sum(row[size] * (1 - d + d * len(ends)) for size, ends in self.ends.items() if ends)

    def advance(self, now: float) -> None:
        """Let it work until `now`; nothing ends before."""
        if self.running and (whole := self._round()):
            for size, ends in self.ends.items():
                if ends:
                    self.turns[size] += (now - self.clock) * self.costs.row[size] / whole
        self.clock = now

    def next_end(self) -> float:
        whole, soonest = self._round(), math.inf
        for size, ends in self.ends.items():
            if ends:
                soonest = min(soonest, (ends[0][0] - self.turns[size]) * whole / self.costs.row[size])
        return self.clock + max(0.0, soonest)

    def add(self, job: Job) -> None:
        heapq.heappush(self.waiting, (job.turn, next(self.order), job))
        self.told[job] = job.seconds
        self._admit()

    def _admit(self) -> None:
        while self.waiting and self.running < self.costs.places:
            _, order, job = heapq.heappop(self.waiting)
            size = job.work.pixels
            turn = self.turns.setdefault(size, 0.0)
            heapq.heappush(self.ends.setdefault(size, []), (turn + job.seconds, order, job))
            self.running += 1

    def finish(self) -> list[Job]:
        """Those that have got all their work by now."""
        done = []
        for size, ends in self.ends.items():
            while ends and ends[0][0] <= self.turns[size] + 1e-9:
                done.append(heapq.heappop(ends)[2])
        self.running -= len(done)
        for job in done:
            del self.told[job]
        self._admit()
        return done

    def lose(self) -> list[Job]:
        """All that it had; it starts over with nothing."""
        lost = list(self.told)
        self.ends, self.turns, self.waiting, self.running, self.told = {}, {}, [], 0, {}
        return lost

    def load(self, now: float) -> Load:
        """What the front knows of it."""
        if now - self.told_at >= REPORT_EVERY_S:
            self.told_at = now
            for size, ends in self.ends.items():
                for end, _, job in ends:
                    self.told[job] = end - self.turns[size] - (now - self.clock) * self._share(size)
        jobs = [(max(0.0, left), job.work.pixels) for job, left in self.told.items()]
        return Load(jobs, self.costs.unshared)

    def _share(self, size: int) -> float:
        return self.costs.row[size] / self._round()

    @property
    def free(self) -> bool:
        """Whether the front would send it one more: one may wait, so that it never stands still."""
        return self.up and not self.leaving and len(self.told) <= self.costs.places

    @property
    def left(self) -> float:
        return sum(self.told.values())
