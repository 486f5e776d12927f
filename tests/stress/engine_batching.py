"""What continuous batching gains, and that no request starves in it: eight clients, batches of one against eight.

`python tests/stress/engine_batching.py [rounds=3] [seconds=10]`; prints a histogram of how long requests waited for
their next step, the last line is JSON, exit code 0 if all holds. Two engines take turns, so that a machine that wanders
wanders for both; the eight clients ask for different step counts and caches, each as soon as it has its answer. A fair
share of a step is what the engine takes for one step of everybody who runs; nobody may wait longer than five of them.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections import Counter
from typing import Any

import engine_common as common

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

CLIENTS = 8
STEPS = (8, 12, 16, 20)
CACHES: tuple[Any, ...] = ("off", "fast", None)
MOST_SHARES = 5.0


class Loop:
    """Eight clients of one engine; the steps their requests took, and the seconds between a request's steps."""

    def __init__(self, batch: int) -> None:
        self.client = ProcessEngineClient(common.ARGS | {"max_num_seqs": batch}, max_queued_requests=CLIENTS)
        self.gaps: list[float] = []
        self.pictures, self.steps, self.asked, self.seconds = 0, 0, 0, 0.0

    async def one(self, client: int, end: float) -> None:
        while time.monotonic() < end:
            self.asked += 1
            turn = self.asked
            asked = Params(num_inference_steps=STEPS[turn % 4], seed=turn, cache=CACHES[turn % 3])
            last, seen = None, 0
            async for output in self.client.generate("sun", asked, f"batching-{client}-{turn}"):
                now = time.monotonic()
                if not output.finished and output.step > seen:
                    if last is not None:
                        self.gaps.append((now - last) / (output.step - seen))
                    last, seen = now, output.step
                assert output.error is None, output.error
            self.pictures += 1
            self.steps += STEPS[turn % 4]

    async def run(self, seconds: float) -> None:
        began = time.monotonic()
        await asyncio.gather(*(self.one(i, began + seconds) for i in range(CLIENTS)))
        self.seconds += time.monotonic() - began

    @property
    def fair_share_s(self) -> float:
        return CLIENTS * self.seconds / self.steps

    def histogram(self) -> dict[str, int]:
        """Waits by powers of two of a fair share."""
        found = Counter(max(-5, math.ceil(math.log2(gap / self.fair_share_s))) for gap in self.gaps)
        return {f"<= {2.0**power:g} shares": found[power] for power in sorted(found)}


async def main(rounds: int = 3, seconds: float = 10.0) -> int:
    loops = {batch: Loop(batch) for batch in (1, CLIENTS)}
    for loop in loops.values():
        await loop.client.start()
    for _ in range(rounds):
        for loop in loops.values():
            await loop.run(seconds)
    for loop in loops.values():
        await loop.client.shutdown()
    alone, together = loops[1], loops[CLIENTS]
    for name, count in together.histogram().items():
        print(f"{name:>18} {count:6d} {'#' * (60 * count // len(together.gaps))}")
    gain = (together.steps / together.seconds) / (alone.steps / alone.seconds)
    longest = max(together.gaps) / together.fair_share_s
    result = {
        "pictures": {str(batch): loop.pictures for batch, loop in loops.items()},
        "steps_per_s": {str(batch): round(loop.steps / loop.seconds, 2) for batch, loop in loops.items()},
        "gain": round(gain, 3),
        "fair_share_ms": round(1e3 * together.fair_share_s, 2),
        "step_wait_p50_ms": 1e3 * common.percentile(together.gaps, 0.5),
        "step_wait_p99_ms": 1e3 * common.percentile(together.gaps, 0.99),
        "longest_wait_in_shares": round(longest, 2),
        "ok": gain > 1 and longest <= MOST_SHARES,
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*(float(word) if "." in word else int(word) for word in sys.argv[1:3]))))
