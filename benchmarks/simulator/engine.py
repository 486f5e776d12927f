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
    """What work takes on one engine, in seconds: rows by pixels; `ends` is encoding and decoding.

    A row in company costs `unshared` of one by itself; `unshared_of` are the sizes of which more is known.
    """

    row: dict[int, float]
    skipped: dict[int, float]
    ends: dict[int, float]
    unshared: float = 0.85
    places: int = 16
    start: float = 8.0  # from nothing to ready
    unshared_of: dict[int, float] = field(default_factory=dict)

    def forward(self, size: int, rows: int) -> float:
        """Seconds of a forward that computes."""
        d = self.unshared_of.get(size, self.unshared)
        return self.row[size] * (1 - d + d * rows)


class Work(NamedTuple):
    """A request: pixels, steps, the share of them that is computed, priority, and who asks (in a closed loop)."""

    pixels: int
    steps: int
    share: float
    priority: int = 0
    client: int = 0

    @property
    def forwards(self) -> int:
        """Of those that compute."""
        return max(1, round(self.steps * self.share))

    def beside(self, costs: Costs) -> float:
        """Seconds that no other request shares: skips, encoding and decoding, whose costs are those in company."""
        return (self.steps - self.forwards) * costs.skipped[self.pixels] + costs.ends[self.pixels]

    def seconds(self, costs: Costs) -> float:
        """Of a request by itself."""
        return self.forwards * costs.row[self.pixels] + self.beside(costs)


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
    """One replica. Requests of one size advance alike, so each size counts its forwards, and ends are known.

    In a round each size has one forward, and each request the same part of what it shares with nobody.
    """

    costs: Costs
    index: int
    clock: float = 0.0
    up: bool = True
    leaving: bool = False
    version: int = 0  # of the event that says when its next request ends
    turns: dict[int, float] = field(default_factory=dict)  # by pixels: the forwards that there were
    beside: dict[int, float] = field(default_factory=dict)  # by pixels: seconds in a round that nobody shares
    ends: dict[int, list[tuple[float, int, Job]]] = field(default_factory=dict)
    running: int = 0
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)
    told: dict[Job, float] = field(default_factory=dict)  # what is left of each, as last reported
    told_at: float = -math.inf
    order: Iterator[int] = field(default_factory=count)

    def _round(self) -> float:
        """Seconds in which each size has one forward."""
        return sum(self.costs.forward(size, len(ends)) + self.beside[size] for size, ends in self.ends.items() if ends)

    def _each(self, work: Work) -> float:
        """Seconds between two of a request's forwards that nobody shares."""
        return work.beside(self.costs) / work.forwards

    def advance(self, now: float) -> None:
        """Let it work until `now`; nothing ends before."""
        if self.running and (whole := self._round()):
            for size, ends in self.ends.items():
                if ends:
                    self.turns[size] += (now - self.clock) / whole
        self.clock = now

    def next_end(self) -> float:
        whole, soonest = self._round(), math.inf
        for size, ends in self.ends.items():
            if ends:
                soonest = min(soonest, (ends[0][0] - self.turns[size]) * whole)
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
            heapq.heappush(self.ends.setdefault(size, []), (turn + job.work.forwards, order, job))
            self.beside[size] = self.beside.get(size, 0.0) + self._each(job.work)
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
            self.beside[job.work.pixels] -= self._each(job.work)
        self._admit()
        return done

    def lose(self) -> list[Job]:
        """All that it had; it starts over with nothing."""
        lost = list(self.told)
        self.ends, self.turns, self.beside, self.waiting, self.running, self.told = {}, {}, {}, [], 0, {}
        return lost

    def load(self, now: float) -> Load:
        """What the front knows of it."""
        if now - self.told_at >= REPORT_EVERY_S:
            self.told_at = now
            whole = self._round()
            for size, ends in self.ends.items():
                for end, _, job in ends:
                    left = end - self.turns[size] - (now - self.clock) / whole
                    self.told[job] = left * (self.costs.row[size] + self._each(job.work))
        jobs = [(max(0.0, left), job.work.pixels) for job, left in self.told.items()]
        return Load(jobs, self.costs.unshared)

    @property
    def free(self) -> bool:
        """Whether the front would send it one more: one may wait, so that it never stands still."""
        return self.up and not self.leaving and len(self.told) <= self.costs.places

    @property
    def left(self) -> float:
        return sum(self.told.values())
