"""Many clients, every kind of request, through the engine process: nothing is lost, every picture is its solo run's.

`python tests/stress/mixed_load.py [requests=500] [clients=64]`; the last line is one JSON document, exit code 0 if all
holds. The solo runs are of the offline engine in this process, one request at a time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import engine_common as common
import numpy as np

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.outputs import OmniRequestOutput

Asked = tuple[str, dict[str, Any]]


async def serve(asked: list[Asked], clients: int) -> tuple[dict[int, OmniRequestOutput], float, Any]:
    outputs: dict[int, OmniRequestOutput] = {}
    todo = iter(enumerate(asked))
    async with ProcessEngineClient(common.ARGS, max_queued_requests=clients) as client:

        async def one_client() -> None:
            for index, (prompt, params) in todo:
                async for output in client.generate(prompt, Params(**params), f"mixed-{index}"):
                    if output.finished:
                        assert index not in outputs and output.request_id == f"mixed-{index}"
                        outputs[index] = output

        began = time.monotonic()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.monotonic() - began
        await asyncio.sleep(0.5)
        return outputs, seconds, await client.stats()


def solo(asked: list[Asked]) -> list[OmniRequestOutput]:
    with Omni(**(common.ARGS | {"max_num_seqs": 1})) as omni:
        return [omni.generate(prompt, params, use_tqdm=False)[0] for prompt, params in asked]


def distance(one: OmniRequestOutput, other: OmniRequestOutput) -> int:
    """Largest difference of a pixel's channel, of 255; 256 where something else differs."""
    if not (one.ok and other.ok and len(one.images) == len(other.images) and one.plan == other.plan):
        return 256
    pairs = [(np.asarray(a, int), np.asarray(b, int)) for a, b in zip(one.images, other.images, strict=True)]
    return max(int(np.abs(a - b).max()) if a.shape == b.shape else 256 for a, b in pairs)


def main(requests: int, clients: int) -> int:
    dice = random.Random(11)
    asked = [common.some_request(dice) for _ in range(requests)]
    outputs, seconds, stats = asyncio.run(serve(asked, clients))
    began = time.monotonic()
    alone = solo(asked)
    solo_seconds = time.monotonic() - began
    away = [distance(outputs[i], alone[i]) if i in outputs else 256 for i in range(requests)]
    result = {
        "requests": requests,
        "clients": clients,
        "answered": len(outputs),
        "failed": sum(not output.ok for output in outputs.values()),
        "largest_difference_of_255": max(away),
        "identical": sum(a == 0 for a in away),
        "pictures": sum(len(output.images) for output in outputs.values()),
        "seconds": round(seconds, 1),
        "solo_seconds": round(solo_seconds, 1),
        "counted": stats.requests,
        "gauges_after": [stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s],
        "steps": {"computed": stats.steps_computed, "skipped": stats.steps_skipped},
        "mean_rows": round(
            sum(rows * count for rows, count in stats.batch_sizes.items()) / sum(stats.batch_sizes.values()), 2
        ),
    }
    good = max(away) <= 1 and len(outputs) == requests and result["gauges_after"] == [0, 0, 0, 0.0]
    print(json.dumps(result | {"ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    numbers = [int(value) for value in sys.argv[1:]]
    sys.exit(main(*(numbers + [500, 64][len(numbers) :])))
