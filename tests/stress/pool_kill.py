"""SIGKILL of one of several engines behind the real command, in the middle of its load: nothing is lost.

PYTHONPATH=.:tests/helpers python tests/stress/pool_kill.py [--requests 200] [--clients 32] [--replicas 2] [--ray]

Every request is answered, counted once, and its picture is the one made alone; the engine is back and serves. With
`--ray` the server is `vllm-omni ray`, and the process that is killed is a replica of Ray Serve. The last line is JSON,
exit code 0 if all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_common as common
import http_common as web
import httpx
from http_load import away, picture
from ray_command import engine_replicas, ray_command


def mixed(count: int) -> list[dict[str, Any]]:
    """Requests of all sizes, lengths and caches, long enough to be met in the middle; the same in every run."""
    pick = random.Random(1)
    return [
        {
            "prompt": pick.choice(common.CAPTIONS),
            "seed": pick.randrange(2**32),
            "size": pick.choice(("64x64", "64x64", "96x96", "auto", "128x128")),
            "steps": pick.choice((10, 20, 28, 50)),
            "cache": pick.choice(("off", "high", "auto", {"speedup": 2.0})),
            "guidance_scale": pick.choice((1.0, 3.5)),
        }
        for _ in range(count)
    ]


def engines(server: web.Command) -> list[int]:
    """The processes of which one is killed: of engines, or of Ray's replicas."""
    own = [pid for pid in common.children(server.process.pid) if "engine.process" in web.cmdline(pid)]
    return own or engine_replicas(server.process.pid)


async def load(server: web.Command, bodies: list[dict[str, Any]], clients: int, replicas: int) -> dict[str, Any]:
    replies: dict[int, httpx.Response] = {}
    waits: list[float] = []
    todo = iter(enumerate(bodies))
    async with web.client(server.url, clients) as client:

        async def one_client() -> None:
            for index, body in todo:
                began = time.perf_counter()
                replies[index] = await client.post(web.IMAGES, json=body)
                waits.append(time.perf_counter() - began)

        async def killer() -> dict[str, Any]:
            await web.wait(lambda: len(replies) >= len(bodies) // 3, 600)
            victim = engines(server)[0]
            flying = min(clients, len(bodies) - len(replies))
            os.kill(victim, signal.SIGKILL)
            return {"killed_after": len(replies), "in_flight": flying}

        began = time.perf_counter()
        *_, killed = await asyncio.gather(*(one_client() for _ in range(clients)), killer())
        seconds = time.perf_counter() - began
        told = await until_settled(client, replicas)
        worst, wrong = 0, [reply.text[:200] for reply in replies.values() if reply.status_code != 200]
        for index, body in enumerate(bodies) if not wrong else ():
            alone = await client.post(web.IMAGES, json=body)
            worst = max(worst, away(picture(replies[index]), picture(alone)))
    waits.sort()
    return killed | told | {
        "requests": len(bodies), "answered": sum(reply.status_code == 200 for reply in replies.values()),
        "wrong": wrong[:3], "worst_difference_255": worst, "seconds": round(seconds, 1),
        "mean_s": round(sum(waits) / len(waits), 3), "p99_s": round(waits[int(0.99 * len(waits))], 3),
    }  # fmt: skip


async def until_settled(client: httpx.AsyncClient, count: int) -> dict[str, Any]:
    """What the server says of itself once `count` engines are ready again."""
    began = time.perf_counter()
    while True:
        replicas = (await client.get("/v1/omni/replicas")).json()["data"]
        settled = len(replicas) == count and all(one["state"] == "ready" and not one["running"] for one in replicas)
        if settled or time.perf_counter() - began > 90:
            break
        await asyncio.sleep(0.2)
    told = await asyncio.to_thread(web.metrics, str(client.base_url).rstrip("/"))
    return {
        "back_after_s": round(time.perf_counter() - began, 1),
        "finished": told["vllm:request_success_total finished"],
        "failed": told.get("vllm:request_success_total failed", 0.0),
        "lost": sum(one["lost"] for one in replicas),
        "restarts": sum(one["restarts"] for one in replicas),
        "answered_by": [one["answered"] for one in replicas],
        "states": [one["state"] for one in replicas],
    }


@contextmanager
def serve(ray: bool, replicas: int) -> Iterator[web.Command]:
    if not ray:
        with web.command("--data-parallel-size", str(replicas)) as server:
            yield server
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_command(Path(folder), "--replicas", str(replicas)) as (url, process, log),
    ):
        yield web.Command(url, process, log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="through Ray Serve")
    options = parser.parse_args()
    with serve(options.ray, options.replicas) as server:
        result = asyncio.run(load(server, mixed(options.requests), options.clients, options.replicas))
        log = server.log.read_text()
        shown = [line for line in log.splitlines() if " replica " in line or "asked again" in line]
        print(*shown[:12], sep="\n")
    count = options.requests
    good = result["answered"] == result["finished"] == count and result["worst_difference_255"] <= 1
    good = good and not result["failed"] and result["states"] == ["ready"] * options.replicas
    good = good and (options.ray or result["restarts"] == 1)  # Ray's new replica has restarted nothing
    print(json.dumps(result | {"ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
