"""Many clients with mixed requests over HTTP: nothing lost, nothing wrong, every picture as it is alone.

PYTHONPATH=.:tests/helpers python tests/stress/http_load.py --clients 64 --requests 500   (32 wait: many return)
PYTHONPATH=.:tests/helpers python tests/stress/http_load.py --clients 64 --minutes 10     (all may wait: none refused)

The command serves in processes of its own. With `--minutes` each client sends the next request when it has its answer,
and the wait that each reply tells of is held against what the server's cost model says at that moment: the planned
seconds of all in flight, less those of the half-done ones that run. Little's law, from the pace of the run, is told
beside it. The last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import itertools
import json
import random
import sys
import time
from collections import defaultdict
from typing import Any

import engine_common as common
import http_common as web
import httpx
import numpy as np
from PIL import Image

MAX_NUM_SEQS = 16
WARM_S = 10.0  # of `--minutes`, until the queue is as it stays; at most a tenth of the run
KINDS = 32  # distinct requests of `--minutes`
WAIT_TOLERANCE = 0.2
LOOK_EVERY_S = 0.5  # at the gauges


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


def picture(reply: httpx.Response) -> bytes:
    return base64.b64decode(reply.json()["data"][0]["b64_json"])


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[bytes, int]:
    """The file, and how often the server said to come back later."""
    for sent_away in range(1000):
        reply = await client.post(web.IMAGES, json=body)
        if reply.status_code == 200:
            return picture(reply), sent_away
        assert reply.status_code == 503 and reply.headers["retry-after"], reply.text
        await asyncio.sleep(float(reply.headers["retry-after"]))
    raise AssertionError("sent away a thousand times")


def away(file: bytes, alone: bytes) -> int:
    """Largest difference of a pixel's channel, of 255; 256 for another size."""
    one, other = (np.asarray(Image.open(io.BytesIO(data)), dtype=int) for data in (file, alone))
    return int(np.abs(one - other).max()) if one.shape == other.shape else 256


async def load(url: str, clients: int, requests: int) -> dict[str, Any]:
    """Each of `requests` once, whatever it takes."""
    bodies = mixed(requests)
    async with web.client(url, clients) as client:
        gate = asyncio.Semaphore(clients)

        async def one(body: dict[str, Any]) -> tuple[bytes, int]:
            async with gate:
                return await ask(client, body)

        began = time.perf_counter()
        together = await asyncio.gather(*map(one, bodies))
        seconds = time.perf_counter() - began
        worst = 0
        for body, (file, _) in zip(bodies, together, strict=True):
            worst = max(worst, away(file, (await ask(client, body))[0]))
    return {"clients": clients, "requests": requests, "pictures": len(together), "seconds": round(seconds, 1),
            "sent_away": sum(count for _, count in together), "worst_difference_255": worst,
            "ok": worst <= 1}  # fmt: skip


def wait_of_the_next(told: dict[str, float]) -> float:
    """Seconds, by the server's gauges: its planned seconds are of those that wait and of those that run, half done."""
    running, waiting, _, cost_s = (told[name] for name in web.GAUGES)
    return cost_s * waiting / max(1.0, waiting + running / 2)


async def run(url: str, clients: int, minutes: float) -> dict[str, Any]:
    """A closed loop for `minutes`; every distinct answer is held against the one made alone."""
    bodies = [body | {"include_timings": True} for body in mixed(KINDS)]
    files: dict[tuple[int, str], bytes] = {}  # by kind and digest: the distinct pictures, once each
    done: list[tuple[float, float, float]] = []  # when it was sent, how long it was to wait, how long it did
    statuses: dict[int, int] = defaultdict(int)
    sent, turns, wrong_seed, outlook = 0, itertools.count(), 0, 0.0
    async with web.client(url, clients) as client:
        alone = [(await ask(client, body))[0] for body in bodies]
        began = time.monotonic()
        end = began + 60 * minutes

        async def look() -> None:
            nonlocal outlook
            while True:
                outlook = wait_of_the_next(await asyncio.to_thread(web.metrics, url))
                await asyncio.sleep(LOOK_EVERY_S)

        async def one_client() -> None:
            nonlocal sent, wrong_seed
            while (now := time.monotonic()) < end:
                kind, told_wait = next(turns) % KINDS, outlook
                sent += 1
                reply = await client.post(web.IMAGES, json=bodies[kind])
                statuses[reply.status_code] += 1
                if reply.status_code == 200:
                    told = reply.json()["omni"]["images"][0]
                    done.append((now, told_wait, told["timings"]["queue_s"]))
                    wrong_seed += told["seed"] != bodies[kind]["seed"]
                    file = picture(reply)
                    files.setdefault((kind, hashlib.sha256(file).hexdigest()), file)

        looking = asyncio.create_task(look())
        await asyncio.gather(*(one_client() for _ in range(clients)))
        looking.cancel()
        took = time.monotonic() - began
    gauges = web.gauges(url)
    warm = began + min(WARM_S, 6 * minutes)
    steady = [(told_wait, waited) for at, told_wait, waited in done if at >= warm]
    predicted, waits = ([pair[i] for pair in steady] for i in (0, 1))
    p99 = [common.percentile(values, 0.99) for values in (predicted, waits)]
    pace = len(done) / took
    worst = max(away(file, alone[kind]) for (kind, _), file in files.items())
    result = {
        "clients": clients,
        "minutes": minutes,
        "sent": sent,
        "answered": len(done),
        "statuses": dict(statuses),
        "per_s": round(pace, 2),
        "distinct_pictures": len(files),
        "worst_difference_255": worst,
        "wrong_seeds": wrong_seed,
        "wait_mean_s": [round(sum(values) / len(values), 3) for values in (predicted, waits)],
        "wait_p99_s": p99,
        "wait_p99_to_predicted": round(p99[1] / p99[0], 3),
        "wait_mean_by_little_s": round((clients - MAX_NUM_SEQS) / pace, 3),
        "gauges_after": gauges,
    }
    good = (
        statuses == {200: sent}
        and worst <= 1
        and not wrong_seed
        and abs(p99[1] / p99[0] - 1) <= WAIT_TOLERANCE
        and not any(gauges)
    )
    return result | {"ok": good}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--minutes", type=float, help="a closed loop of this length, in place of --requests")
    args = parser.parse_args()
    queue = args.clients if args.minutes else 32
    with web.command("--max-num-seqs", str(MAX_NUM_SEQS), "--max-queued-requests", str(queue)) as server:
        work = run(server.url, args.clients, args.minutes) if args.minutes else None
        told = asyncio.run(work or load(server.url, args.clients, args.requests))
    print(json.dumps(told))
    return 0 if told["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
