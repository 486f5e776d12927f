"""More requests over HTTP than the server can do: it keeps its pace, refuses at once, official clients come through.

PYTHONPATH=.:tests/helpers python tests/stress/http_overload.py [--rounds 4] [--seconds 12]

The command serves in processes of its own, 8 running and 32 waiting. In each round a closed loop tells the capacity and
open arrivals at 120 % of it follow, counted while the batch is full. Then official clients with their default retries
(two) send twice the capacity for 10 s, and a few after that. The last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import engine_common as common
import http_common as web
import httpx
from openai import APIStatusError, AsyncOpenAI
from overload_rounds import Rounds

RUNNING, QUEUE = 8, 32
BODY: dict[str, Any] = {"prompt": "sun", "steps": 16, "cache": "fast"}
OVERLOAD_S, CALM_S = 10.0, 15.0


class Overload(Rounds):
    def __init__(self, client: httpx.AsyncClient) -> None:
        super().__init__(RUNNING, QUEUE)
        self.client, self.seeds = client, itertools.count()
        self.refusal: list[float] = []
        self.retry_after: list[float] = []
        self.other: Counter[int] = Counter()

    async def one(self, arriving: bool = False) -> None:
        began, noted = time.perf_counter(), self.noting
        reply = await self.client.post(web.IMAGES, json=BODY | {"seed": next(self.seeds)})
        if reply.status_code == 200:
            self.done += 1
        elif reply.status_code == 503:
            if noted:
                self.refusal.append(time.perf_counter() - began)
            self.retry_after.append(float(reply.headers.get("retry-after", "nan")))
        else:
            self.other[reply.status_code] += 1


async def official(url: str, rate: float) -> dict[str, Any]:
    """Official clients at `rate` for OVERLOAD_S, one per second in the calm: how they ended, how often they sent."""
    hits: Counter[str] = Counter()
    ends: Counter[str] = Counter()

    async def note(request: httpx.Request) -> None:
        hits[request.headers["x-request-id"]] += 1

    http = httpx.AsyncClient(event_hooks={"request": [note]}, limits=httpx.Limits(max_connections=None), timeout=600)
    async with AsyncOpenAI(base_url=url + "/v1", api_key="x", http_client=http) as client:

        async def one(name: str) -> None:
            body = {"seed": len(hits), "steps": BODY["steps"], "cache": BODY["cache"]}
            kind = name.partition("-")[0]
            try:
                made = await client.images.generate(prompt="sun", extra_body=body, extra_headers={"x-request-id": name})
            except APIStatusError as error:
                told = error.body if isinstance(error.body, dict) else {}
                ends[f"{kind} {error.status_code} {told.get('code')}"] += 1
            else:
                ends[f"{kind} {'ok' if made.data and made.data[0].b64_json else 'empty'}"] += 1

        tasks, dice, began = [], random.Random(6), time.monotonic()
        due = began
        while due < began + OVERLOAD_S:
            tasks.append(asyncio.create_task(one(f"overload-{len(tasks)}")))
            due += dice.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*tasks)
        seconds = time.monotonic() - began
        storm = len(tasks)
        for turn in range(int(CALM_S)):
            tasks.append(asyncio.create_task(one(f"calm-{turn}")))
            await asyncio.sleep(1.0)
        await asyncio.gather(*tasks)
    calm_hits = [count for name, count in hits.items() if name.startswith("calm")]
    return {
        "sent": storm,
        "all_ended_after_s": round(seconds, 1),
        "ends": dict(ends),
        "hits_per_request": round(sum(hits.values()) / len(hits), 2),
        "hits_most": max(hits.values()),
        "calm_hits_most": max(calm_hits),
        "ok": max(hits.values()) <= 3
        and max(calm_hits) == 1
        and ends["calm ok"] == len(calm_hits)
        and set(ends) <= {"overload ok", "overload 503 queue_full", "calm ok"}
        and sum(ends.values()) == len(hits) == storm + len(calm_hits),
    }


async def main(url: str, rounds: int, seconds: float) -> dict[str, Any]:
    async with web.client(url, 2000) as client:
        load = Overload(client)
        await load.closed(2)
        rates = await load.run(rounds, seconds)
    result = {
        "capacity_per_s": [round(c, 2) for c in rates.capacity],
        "goodput_per_s": [round(g, 2) for g in rates.goodput],
        "goodput_share": round(rates.share, 3),
        "refused": [len(load.retry_after), len(load.refusal)],  # in all, and while the batch was full: these are timed
        "refusal_p50_s": common.percentile(load.refusal, 0.5),
        "refusal_p99_s": common.percentile(load.refusal, 0.99),
        "refusal_max_s": round(max(load.refusal, default=0), 4),
        "retry_after_s": [min(load.retry_after, default=0), max(load.retry_after, default=0)],
        "other_statuses": dict(load.other),
        "gauges_after": web.gauges(url),
    }
    clients = await official(url, 2 * rates.capacity[-1])
    result |= {"official_clients": clients, "gauges_at_the_end": web.gauges(url)}
    good = (
        rates.share >= 0.95
        and result["refusal_p99_s"] < 0.02
        and len(load.refusal) > 0
        and min(load.retry_after) >= 1
        and not load.other
        and not any(result["gauges_after"])
        and not any(result["gauges_at_the_end"])
        and clients["ok"]
    )
    return result | {"ok": good}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=12.0)
    args = parser.parse_args()
    gc.collect()
    gc.freeze()  # a collection here would be told as the server's time
    with web.command("--max-num-seqs", str(RUNNING), "--max-queued-requests", str(QUEUE)) as server:
        told = asyncio.run(main(server.url, args.rounds, args.seconds))
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)
