"""More requests than the engine can do, from two classes of priority: it keeps its pace and refuses at once.

`python tests/stress/engine_overload.py [rounds=4] [seconds=12]`; the last line is JSON, exit code 0 if all holds. In
each round a closed loop tells the capacity, and open arrivals at 120 % of it follow at once, with 32 places to wait;
both are counted over `seconds` in which the engine's batch is full (`overload_rounds.py`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import engine_common as common
from overload_rounds import Rounds

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

RUNNING, QUEUE = 8, 32  # so that waiting, not running, is most of a request's time
PARAMS: dict[str, Any] = {"num_inference_steps": 16, "cache": "fast"}
HIGH, LOW = 0, 10


class Overload(Rounds):
    """A quarter of the arrivals is urgent."""

    def __init__(self, client: ProcessEngineClient) -> None:
        super().__init__(RUNNING, QUEUE)
        self.client, self.ids = client, 0
        self.latency: dict[int, list[float]] = {HIGH: [], LOW: []}
        self.refusal: list[float] = []
        self.retry_after: list[float] = []
        self.lost = 0

    async def one(self, arriving: bool = False) -> None:
        self.ids += 1
        began, noted = time.perf_counter(), self.noting
        priority = HIGH if arriving and self.dice.random() < 0.25 else LOW
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


async def main(rounds: int, seconds: float) -> int:
    async with ProcessEngineClient(common.ARGS | {"max_num_seqs": RUNNING}, max_queued_requests=QUEUE) as client:
        load = Overload(client)
        await load.closed(2)
        rates = await load.run(rounds, seconds)
        stats = await client.stats()
    p95 = {name: common.percentile(load.latency[level], 0.95) for name, level in (("high", HIGH), ("low", LOW))}
    result = {
        "capacity_per_s": [round(c, 2) for c in rates.capacity],
        "goodput_per_s": [round(g, 2) for g in rates.goodput],
        "goodput_share": round(rates.share, 3),
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
        rates.share >= 0.95
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
