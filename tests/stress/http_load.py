"""Many clients with mixed requests: nothing lost, nothing wrong, every picture as it is alone. Prints JSON.

PYTHONPATH=.:tests python tests/stress/http_load.py --clients 64 --requests 500
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import time
from typing import Any

import httpx
import numpy as np
from http_server import serve
from PIL import Image


def mixed(count: int) -> list[dict[str, Any]]:
    """Requests of every kind, the same in every run."""
    pick = random.Random(0)
    return [
        {
            "prompt": pick.choice(("red apple", "cat face", "rocket", "guitar", "penguin")),
            "seed": pick.randrange(2**32),
            "size": pick.choice(("64x64", "64x64", "48x64", "auto")),
            "steps": pick.choice((4, 6, 9, 12)),
            "cache": pick.choice(("off", "high", "balanced", "fast")),
            "guidance_scale": pick.choice((1.0, 3.5)),
        }
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The picture, and how often the server said to come back later."""
    for sent_away in range(1000):
        reply = await client.post("/v1/images/generations", json=body)
        if reply.status_code == 200:
            data = base64.b64decode(reply.json()["data"][0]["b64_json"])
            return np.asarray(Image.open(io.BytesIO(data)), dtype=int), sent_away
        assert reply.status_code == 503 and reply.headers["retry-after"], reply.text
        await asyncio.sleep(float(reply.headers["retry-after"]))
    raise AssertionError("sent away a thousand times")


async def load(url: str, clients: int, requests: int) -> dict[str, Any]:
    bodies = mixed(requests)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        gate = asyncio.Semaphore(clients)

        async def one(body: dict[str, Any]) -> tuple[np.ndarray, int]:
            async with gate:
                return await ask(client, body)

        began = time.perf_counter()
        together = await asyncio.gather(*map(one, bodies))
        seconds = time.perf_counter() - began
        worst = 0
        for body, (picture, _) in zip(bodies, together, strict=True):
            alone, _ = await ask(client, body)
            worst = max(worst, int(np.abs(picture - alone).max()))
    sent_away = sum(count for _, count in together)
    return {"clients": clients, "requests": requests, "pictures": len(together), "sent_away": sent_away,
            "seconds": round(seconds, 1), "worst_difference_255": worst}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args()
    with serve(max_queued_requests=32) as server:
        told = asyncio.run(load(server.url, args.clients, args.requests))
    print(json.dumps(told))
    assert told["worst_difference_255"] <= 1


if __name__ == "__main__":
    main()
