"""One seed, one picture: alone, in another order, after a restart, in a batch, and with two threads instead of one.

The first three must be the same bytes; a batch or another number of threads rounds a matrix product otherwise, which
may change a shade by 1 of 255. Prints for each how many pictures and pixels differ, as JSON; exit code 0 where so.

PYTHONPATH=.:tests/helpers python tests/stress/http_seeds.py --pictures 100
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from http_server import serve
from PIL import Image


def requests(count: int) -> list[dict[str, Any]]:
    """Settings that share a batch, the same in every run."""
    words, caches = ("red apple", "cat face", "rocket", "guitar", "penguin"), ("off", "high", "balanced", "fast")
    return [{"prompt": words[i % 5], "seed": i, "steps": 9, "cache": caches[i % 4]} for i in range(count)]


def ask(url: str, bodies: Sequence[dict[str, Any]], together: int = 1) -> list[np.ndarray]:
    def one(body: dict[str, Any]) -> np.ndarray:
        reply = client.post("/v1/images/generations", json=body)
        assert reply.status_code == 200, reply.text
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))), dtype=int)

    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(together) as pool:
        return list(pool.map(one, bodies))


def compare(first: list[np.ndarray], second: list[np.ndarray]) -> dict[str, Any]:
    apart = [np.abs(a - b).max(axis=-1) for a, b in zip(first, second, strict=True)]
    return {"pictures": len(apart), "identical": sum(not one.any() for one in apart),
            "pixels_that_differ": f"{np.mean([np.mean(one > 0) for one in apart]):.2e}",
            "worst_255": int(max(one.max() for one in apart))}  # fmt: skip


@contextmanager
def threads(count: int) -> Iterator[None]:
    """For engines that start inside."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    yield
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="requests at once (8)")
    args = parser.parse_args()
    logging.getLogger("vllm_omni").setLevel(logging.ERROR)
    bodies = requests(args.pictures)
    engine = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": args.batch}
    told: dict[str, Any] = {}
    with threads(1):
        with serve(engine) as server:
            alone = ask(server.url, bodies)
            told["other order"] = compare(alone[::-1], ask(server.url, bodies[::-1]))
            told[f"{args.batch} at once"] = compare(alone, ask(server.url, bodies, together=args.batch))
        with serve(engine) as server:
            told["after a restart"] = compare(alone, ask(server.url, bodies))
    with threads(2), serve(engine) as server:
        told["two threads"] = compare(alone, ask(server.url, bodies))
    same = all(told[name]["worst_255"] == 0 for name in ("other order", "after a restart"))
    holds = same and all(one["worst_255"] <= 1 for one in told.values())
    print(json.dumps({"holds": holds, **told}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
