"""Storms of aborts and a long run of short requests: memory, files and threads stay flat, pictures stay right.

`python tests/stress/engine_soak.py [aborts=12000] [requests=600]`; the last line is JSON, exit code 0 if all holds. The
storm comes in three parts: an allocator grows to what a storm needs in the first, and a leak goes on in the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import engine_common as common
import numpy as np

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

CLIENTS = 32
SHORT = {"height": 32, "width": 32, "num_inference_steps": 4}
MOST_GROWTH_MB = 24.0  # of a run; allocators keep what a new mix of sizes once needed
MOST_KB_PER_ABORT = 1.0  # in the last two thirds of the storm


class Soak:
    def __init__(self, client: ProcessEngineClient) -> None:
        self.client, self.dice, self.ids = client, random.Random(3), 0
        self.ends: Counter[str] = Counter()

    async def one(self, leave_after_s: float | None = None, **params: Any) -> None:
        """One request, left alone after some seconds if asked so."""
        self.ids += 1
        name = f"soak-{self.ids}"

        async def run() -> None:
            async for output in self.client.generate("a red apple", Params(**params), name):
                if output.finished:
                    self.ends["ok" if output.ok else type(output.error).__name__] += 1

        try:
            await asyncio.wait_for(run(), leave_after_s)
        except TimeoutError:
            self.ends["left"] += 1
        except QueueFullError:  # those that were left hold their places until the engine's next step
            self.ends["refused"] += 1
            await asyncio.sleep(0.02)
            await self.one(leave_after_s, **params)

    async def many(self, count: int, abort: bool) -> None:
        left = iter(range(count))

        async def one_client() -> None:
            for _ in left:
                params = SHORT | {"seed": self.dice.randrange(2**32), "cache": self.dice.choice(common.CACHES[:4])}
                if abort:
                    params |= {"num_inference_steps": self.dice.choice((4, 40, 400))}
                await self.one(self.dice.choice((0.001, 0.005, 0.02, 0.2)) if abort else None, **params)

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        while (stats := await self.client.stats()).running + stats.waiting:  # those left, until the next step
            await asyncio.sleep(0.01)

    def held(self) -> dict[str, Any]:
        pids = {"front_end": os.getpid(), "engine": self.client._engine.process.pid}
        return {name: common.holds(pid) | {"rss_mb": round(common.rss_mb(pid), 1)} for name, pid in pids.items()}

    async def picture(self) -> np.ndarray:
        async for output in self.client.generate("a red apple", Params(seed=5, num_inference_steps=8), "same"):
            if output.finished:
                return np.asarray(output.images[0])
        raise AssertionError("no picture")


async def main(aborts: int, requests: int) -> int:
    async with ProcessEngineClient(common.ARGS, max_queued_requests=CLIENTS) as client:
        soak = Soak(client)
        await soak.many(CLIENTS * 8, abort=True)  # every kind of work once: what is kept for good is kept now
        await soak.many(CLIENTS * 8, abort=False)
        picture = await soak.picture()
        held = [soak.held()]
        began = time.monotonic()
        storm = []
        for _ in range(3):
            await soak.many(aborts // 3, abort=True)
            storm.append(soak.held())
        held.append(storm[-1])
        storm_s = time.monotonic() - began
        for _ in range(3):
            await soak.many(requests // 3, abort=False)
            held.append(soak.held())
        same = bool(np.array_equal(picture, await soak.picture()))
        await asyncio.sleep(0.5)
        stats = await client.stats()
    storm_kb = 1024 * (storm[2]["engine"]["rss_mb"] - storm[0]["engine"]["rss_mb"]) / (2 * aborts / 3)
    grown = {who: round(held[-1][who]["rss_mb"] - held[1][who]["rss_mb"], 1) for who in held[0]}
    result = {
        "aborts": aborts,
        "requests": requests,
        "ends": dict(soak.ends),
        "counted": stats.requests,
        "aborts_by_stage": stats.aborts_by_stage,
        "storm_s": round(storm_s, 1),
        "engine_kb_per_abort": round(storm_kb, 3),
        "engine_rss_mb_in_storm": [h["engine"]["rss_mb"] for h in [held[0], *storm]],
        "rss_growth_mb": grown,
        "engine_rss_mb": [h["engine"]["rss_mb"] for h in held],
        "front_end_rss_mb": [h["front_end"]["rss_mb"] for h in held],
        "fds_and_threads": {who: [held[0][who], held[-1][who]] for who in held[0]},
        "gauges_after": [stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s],
        "same_picture": same,
        "restarts": stats.restarts,
    }
    flat = all(held[-1][who][kind] <= held[0][who][kind] for who in held[0] for kind in ("fds", "threads"))
    good = (
        same
        and flat
        and storm_kb < MOST_KB_PER_ABORT
        and max(grown.values()) < MOST_GROWTH_MB
        and stats.restarts == 0
        and result["gauges_after"] == [0, 0, 0, 0.0]
        and sum(stats.requests.values()) == soak.ids + 2 - soak.ends["refused"]
        and set(soak.ends) <= {"ok", "left", "refused"}
    )
    print(json.dumps(result | {"ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    numbers = [int(value) for value in sys.argv[1:]]
    sys.exit(asyncio.run(main(*(numbers + [12000, 600][len(numbers) :]))))
