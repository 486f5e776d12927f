"""What thousands of requests leave behind in both processes of the command: memory by place, and the cache's own count.

PYTHONPATH=.:tests/helpers python tests/stress/http_memory.py [--requests 3000]

Needs memray (`pip install memray`), which is in both processes. After a warm-up, a quarter of the requests is made
under one recording and the rest under another, three times as long. A place in our code that holds an object for every
twentieth request, and after the second twice or three times as many as after the first, grows with the requests. (The
prompts' words are from a fixed set: a tokenizer keeps the last ten thousand that it met.) At every report of the engine
the bytes of the cache as it counts them are held against those of the tensors that live. The last line is JSON, exit
code 0 if all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import engine_common as common
import http_common as web
import memray

CLIENTS = 16
GROWS = 2.0  # times what the recording of a third of the length left, ...
LEAST_OBJECTS = 0.05  # ... and so many objects more, for each request that was more
PACKAGE = str(web.ROOT / "vllm_omni")
SETTLE_S = 6.0  # a connection that is kept alive keeps the context of its last request, with its facts, for 5 s
ROLES = ("front_end", "engine")


def left_by_place(file: Path) -> tuple[Counter[str], int]:
    """Objects that a recording saw made and not freed, by the innermost place in our package; bytes of all of them."""
    places: Counter[str] = Counter()
    total = 0
    with memray.FileReader(str(file)) as reader:
        for record in reader.get_leaked_allocation_records(merge_threads=True):
            total += record.size
            for _, source, line in record.stack_trace():
                if source.startswith(PACKAGE):
                    places[f"{Path(source).relative_to(web.ROOT)}:{line}"] += record.n_allocations
                    break
    return places, total


async def requests(url: str, count: int, first_seed: int) -> Counter[int]:
    """Of all kinds: JSON and streams, with and without cache, one wrong in ten, one in ten left half-way."""
    statuses: Counter[int] = Counter()
    turns = iter(range(first_seed, first_seed + count))
    async with web.client(url, CLIENTS) as client:

        async def one_client() -> None:
            for turn in turns:
                body: dict[str, Any] = {"prompt": f"cat {turn % 50}", "seed": turn, "steps": 6, "size": "32x32"}
                body |= {"cache": ("off", "fast", "balanced")[turn % 3]}
                if turn % 10 == 0:
                    body |= {"steps": 0}
                elif turn % 10 == 1:
                    body |= {"steps": 60, "timeout_s": 0.05}
                elif turn % 4 == 0:
                    body |= {"stream": True, "partial_images": 1}
                statuses[(await client.post(web.IMAGES, json=body)).status_code] += 1

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    return statuses


async def bursts(url: str) -> None:
    """Requests that come and end together, as many as fit in a batch and a few more."""
    async with web.client(url, CLIENTS) as client:
        for many in range(1, CLIENTS + 1):
            body = {"prompt": "cat", "steps": 2, "size": "32x32", "cache": "off"}
            await asyncio.gather(*(client.post(web.IMAGES, json=body | {"seed": seed}) for seed in range(many)))


def record(server: web.Command, kind: int) -> None:
    time.sleep(SETTLE_S)
    for pid in (server.process.pid, server.engine):
        os.kill(pid, kind)
    time.sleep(1.0)  # for the signal to be seen, and its recording to begin or end


def main(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        probe = {"OMNI_PROBE_MEMRAY": f"{folder}/memory", "OMNI_PROBE_CACHE": f"{folder}/cache"}
        began = time.monotonic()
        statuses: Counter[int] = Counter()
        gauges, rss = [], []
        parts = (count // 4, count - count // 4)
        with web.command("--max-num-seqs", "8", probe=probe) as server:
            # every kind of work and every size of a batch: what is kept for good, such as kernels, is kept now
            asyncio.run(bursts(server.url))
            asyncio.run(requests(server.url, count // 4, 10**6))
            gauges.append(web.gauges(server.url))
            for number, part in enumerate(parts):
                record(server, signal.SIGUSR1)
                statuses += asyncio.run(requests(server.url, part, number * count))
                gauges.append(web.gauges(server.url))
                record(server, signal.SIGUSR2)
                rss.append([round(common.rss_mb(pid), 1) for pid in (server.process.pid, server.engine)])
            code = server.end()
            log = server.log.read_text()
        seconds = time.monotonic() - began
        counted = [tuple(map(int, line.split())) for line in Path(f"{folder}/cache").read_text().splitlines()]
        growing: dict[str, list[int]] = {}
        left: dict[str, list[int]] = {}
        most: dict[str, int] = {}
        for role in ROLES:
            (short, all_short), (long, all_long) = (left_by_place(Path(f"{folder}/memory.{role}.{n}")) for n in (0, 1))
            left[role] = [all_short, all_long]
            least = LEAST_OBJECTS * (parts[1] - parts[0])
            most[role] = max([value - short[place] for place, value in long.items()])
            for place, value in long.items():
                if value >= GROWS * short[place] and value - short[place] >= least:
                    growing[f"{role} {place}"] = [short[place], value]
    wrong = [pair for pair in counted if pair[0] != pair[1]]
    good = (
        not growing
        and not wrong
        and max(counted)[0] > 0
        and not any(any(values) for values in gauges)
        and code == 0
        and "Traceback" not in log
        and set(statuses) == {200, 400, 504}
    )
    return {
        "requests": count,
        "statuses": dict(statuses),
        "growing_places": growing,
        "most_objects_more_at_a_place": most,
        "left_bytes_of_both_recordings": left,
        "rss_mb_after_each": rss,
        "reports": len(counted),
        "reports_with_bytes": sum(gauge > 0 for gauge, _ in counted),
        "most_cache_bytes": max(counted)[0],
        "reports_where_gauge_and_tensors_differ": len(wrong),
        "gauges_when_idle": gauges,
        "exit_code": code,
        "seconds": round(seconds),
        "ok": good,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    told = main(parser.parse_args().requests)
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)
