"""More requests than can be served, in rounds: a closed loop tells the capacity, and open arrivals beyond it follow at
once, so that a machine that wanders wanders for both."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

WARM_S = 2.0  # until a closed loop's batch is full; open arrivals fill the queue first
OVERLOAD = 1.2  # arrivals, of the capacity


@dataclass(frozen=True)
class Rates:
    """Requests served per second, by round; each open phase lies between two closed ones."""

    capacity: list[float]
    goodput: list[float]

    @property
    def share(self) -> float:
        around = [(a + b) / 2 for a, b in itertools.pairwise(self.capacity)]
        return sum(self.goodput) / sum(around)


class Rounds(ABC):
    """What is overloaded has `running` places and `queue` more to wait in."""

    def __init__(self, running: int, queue: int) -> None:
        self.running, self.queue = running, queue
        self.dice = random.Random(5)
        self.done = 0
        self.noting = False  # whether what is sent now is in a phase that counts

    @abstractmethod
    async def one(self, arriving: bool = False) -> None:
        """One request to its end, counted in `done` if it was served; `arriving`: of the open loop."""

    async def run(self, rounds: int, seconds: float) -> Rates:
        capacity, goodput = [], []
        for _ in range(rounds):
            capacity.append(await self.closed(seconds))
            goodput.append(await self.open(seconds, OVERLOAD * capacity[-1]))
        capacity.append(await self.closed(seconds))
        await asyncio.sleep(0.5)
        return Rates(capacity, goodput)

    async def closed(self, seconds: float) -> float:
        """Of a full house of clients that ask again as soon as they have their answer."""
        stop = False

        async def one_client() -> None:
            while not stop:
                await self.one()

        tasks = [asyncio.create_task(one_client()) for _ in range(self.running + self.queue // 2)]
        await asyncio.sleep(WARM_S)
        reached = await self._rate(seconds)
        stop = True
        await asyncio.gather(*tasks)
        return reached

    async def open(self, seconds: float, rate: float) -> float:
        """Of requests that arrive at `rate`, whatever becomes of them, once the queue is full."""
        tasks = [asyncio.create_task(self.one()) for _ in range(self.running + self.queue)]

        async def arrivals() -> None:
            due = time.monotonic()
            while True:
                tasks.append(asyncio.create_task(self.one(arriving=True)))
                due += self.dice.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))

        source = asyncio.create_task(arrivals())
        await asyncio.sleep(WARM_S)
        self.noting = True
        reached = await self._rate(seconds)
        self.noting = False
        source.cancel()
        await asyncio.gather(*tasks)
        return reached

    async def _rate(self, seconds: float) -> float:
        """Requests done per second from now on."""
        before, began = self.done, time.monotonic()
        await asyncio.sleep(seconds)
        return (self.done - before) / (time.monotonic() - began)
