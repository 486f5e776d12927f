"""More requests than the engine can do, from two classes of priority: it keeps its pace and refuses at once.

`python tests/stress/engine_overload.py [seconds=40]`; the last line is JSON, exit code 0 if all holds. Capacity is what
a closed loop reaches first; then arrivals are open, at 120 % of it, with 32 places to wait.
"""

from __future__ import annotations

import asyncio
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
PARAMS: dict[str, Any] = {"num_inference_steps": 16, "cache": "fast"}
HIGH, LOW = 0, 10


class Overload:
    def __init__(self, client: ProcessEngineClient) -> None:
        self.client, self.ids, self.done = client, 0, 0
        self.latency: dict[int, list[float]] = {HIGH: [], LOW: []}
        self.refusal: list[float] = []
        self.retry_after: list[float] = []
        self.lost = 0

    async def one(self, priority: int) -> None:
        self.ids += 1
        began = time.perf_counter()
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
            self.latency[priority].append(time.perf_counter() - began)

    async def closed(self, seconds: float) -> float:
        """Requests per second when a full house of clients asks again as soon as it has its answer."""
        until, before, began = time.monotonic() + seconds, self.done, time.monotonic()

        async def one_client() -> None:
            while time.monotonic() < until:
                await self.one(LOW)

        await asyncio.gather(*(one_client() for _ in range(common.ARGS["max_num_seqs"] + QUEUE // 2)))
        return (self.done - before) / (time.monotonic() - began)

    async def open(self, seconds: float, rate: float) -> float:
        """Requests per second while they arrive at `rate`, whatever becomes of them; a quarter of them urgent."""
        dice, tasks = random.Random(5), []
        until, before, began = time.monotonic() + seconds, self.done, time.monotonic()
        while time.monotonic() < until:
            tasks.append(asyncio.create_task(self.one(HIGH if dice.random() < 0.25 else LOW)))
            await asyncio.sleep(dice.expovariate(rate))
        reached = (self.done - before) / (time.monotonic() - began)
        await asyncio.gather(*tasks)
        return reached


async def main(seconds: float) -> int:
    async with ProcessEngineClient(common.ARGS, max_queued_requests=QUEUE) as client:
        load = Overload(client)
        await load.closed(5)
        capacity = await load.closed(seconds / 2)
        load.latency = {HIGH: [], LOW: []}
        load.refusal.clear()
        goodput = await load.open(seconds, 1.2 * capacity)
        await asyncio.sleep(0.5)
        stats = await client.stats()
    p95 = {name: common.percentile(load.latency[level], 0.95) for name, level in (("high", HIGH), ("low", LOW))}
    result = {
        "capacity_per_s": round(capacity, 2),
        "goodput_per_s": round(goodput, 2),
        "goodput_share": round(goodput / capacity, 3),
        "refused": len(load.refusal),
        "refusal_p99_s": common.percentile(load.refusal, 0.99),
        "retry_after_s": [round(min(load.retry_after, default=0), 2), round(max(load.retry_after, default=0), 2)],
        "failed": load.lost,
        "p95_s": p95,
        "slowest_low_s": round(max(load.latency[LOW]), 2),
        "gauges_after": [stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s],
    }
    good = (
        goodput >= 0.95 * capacity
        and result["refusal_p99_s"] < 0.02
        and len(load.refusal) > 0
        and p95["high"] < p95["low"]
        and not load.lost
        and result["gauges_after"] == [0, 0, 0, 0.0]
    )
    print(json.dumps(result | {"ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(float((sys.argv[1:] or ["40"])[0]))))
