"""More requests than the engine can do, from two classes of priority: it keeps its pace and refuses at once.

`python tests/stress/engine_overload.py [rounds=4] [seconds=12]`; the last line is JSON, exit code 0 if all holds. In
each round a closed loop tells the capacity, and open arrivals at 120 % of it follow at once, with 32 places to wait;
both are counted over `seconds` in which the engine's batch is full, so that a machine that wanders wanders for both.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from typing import Any

import engine_common as common

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

QUEUE = 32
ARGS = common.ARGS | {"max_num_seqs": 8}  # so that waiting, not running, is most of a request's time
PARAMS: dict[str, Any] = {"num_inference_steps": 16, "cache": "fast"}
HIGH, LOW = 0, 10
WARM_S = 2.0  # until a closed loop's batch is full; open arrivals fill the queue first


class Overload:
    def __init__(self, client: ProcessEngineClient) -> None:
        self.client, self.ids, self.done = client, 0, 0
        self.dice = random.Random(5)
        self.latency: dict[int, list[float]] = {HIGH: [], LOW: []}
        self.refusal: list[float] = []
        self.retry_after: list[float] = []
        self.lost = 0
        self.noting = False

    async def one(self, priority: int) -> None:
        self.ids += 1
        began, noted = time.perf_counter(), self.noting
        try:
            stream = self.client.generate("sun", Params(seed=self.ids, **PARAMS), f"over-{self.ids}", priority=priority)
            async for output in stream:
                if output.finished:
                    self.done += output.ok
                    self.lost += not output.ok
        except QueueFullError as error:
            self.refusal.append(time.perf_counter() - began)
            self.retry_after.append(error.retry_after_s)
        else:
            if noted:
                self.latency[priority].append(time.perf_counter() - began)

    async def rate(self, seconds: float) -> float:
        """Requests done per second from now on."""
        before, began = self.done, time.monotonic()
        await asyncio.sleep(seconds)
        return (self.done - before) / (time.monotonic() - began)

    async def closed(self, seconds: float) -> float:
        """Of a full house of clients that ask again as soon as they have their answer."""
        stop = False

        async def one_client() -> None:
            while not stop:
                await self.one(LOW)

        tasks = [asyncio.create_task(one_client()) for _ in range(ARGS["max_num_seqs"] + QUEUE // 2)]
        await asyncio.sleep(WARM_S)
        reached = await self.rate(seconds)
        stop = True
        await asyncio.gather(*tasks)
        return reached

    async def open(self, seconds: float, rate: float) -> float:
        """Of requests that arrive at `rate`, whatever becomes of them, once the queue is full; a quarter is urgent."""
        tasks: list[asyncio.Task[None]] = []

        async def arrivals() -> None:
            due = time.monotonic()
            while True:
                tasks.append(asyncio.create_task(self.one(HIGH if self.dice.random() < 0.25 else LOW)))
                due += self.dice.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))

        for _ in range(ARGS["max_num_seqs"] + QUEUE):
            tasks.append(asyncio.create_task(self.one(LOW)))
        source = asyncio.create_task(arrivals())
        await asyncio.sleep(WARM_S)
        self.noting = True
        reached = await self.rate(seconds)
        self.noting = False
        source.cancel()
        await asyncio.gather(*tasks)
        return reached


async def main(rounds: int, seconds: float) -> int:
    async with ProcessEngineClient(ARGS, max_queued_requests=QUEUE) as client:
        load = Overload(client)
        await load.closed(2)
        capacity, goodput = [], []
        for _ in range(rounds):
            capacity.append(await load.closed(seconds))
            goodput.append(await load.open(seconds, 1.2 * capacity[-1]))
        capacity.append(await load.closed(seconds))  # each open phase lies between two closed ones
        await asyncio.sleep(0.5)
        stats = await client.stats()
    around = [(a + b) / 2 for a, b in itertools.pairwise(capacity)]
    share = sum(goodput) / sum(around)
    p95 = {name: common.percentile(load.latency[level], 0.95) for name, level in (("high", HIGH), ("low", LOW))}
    result = {
        "capacity_per_s": [round(c, 2) for c in capacity],
        "goodput_per_s": [round(g, 2) for g in goodput],
        "goodput_share": round(share, 3),
        "refused": len(load.refusal),
        "refusal_p99_s": common.percentile(load.refusal, 0.99),
        "refusal_max_s": round(max(load.refusal, default=0), 4),
        "retry_after_s": [round(min(load.retry_after, default=0), 2), round(max(load.retry_after, default=0), 2)],
        "failed": load.lost,
        "p95_s": p95,
        "p95_high_to_low": round(p95["high"] / max(p95["low"], 1e-9), 3),
        "slowest_low_s": round(max(load.latency[LOW], default=0), 2),
        "gauges_after": [stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s],
    }
    good = (
        share >= 0.95
        and result["refusal_p99_s"] < 0.02
        and len(load.refusal) > 0
        and min(load.retry_after) >= 1
        and 3 * p95["high"] <= p95["low"]
        and not load.lost
        and result["gauges_after"] == [0, 0, 0, 0.0]
    )
    print(json.dumps(result | {"ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    numbers = [float(value) for value in sys.argv[1:]] + [4.0, 12.0][len(sys.argv) - 1 :]
    sys.exit(asyncio.run(main(int(numbers[0]), numbers[1])))
