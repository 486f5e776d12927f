"""Pairs of requests at once, each with a prompt, a seed and settings of its own: no reply holds anything of another.

PYTHONPATH=.:tests/helpers python tests/stress/http_isolation.py [--pairs 1000]

The two of a pair go out together, several pairs at a time. Every reply must hold its own id, prompt, seed, size, steps
and cache settings and nobody else's marker, and no two the same picture; every fourth picture is held against the one
made alone afterwards. The last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import sys
import time
from collections import Counter
from typing import Any

import http_common as web
import httpx
import numpy as np
from PIL import Image

PAIRS_AT_ONCE = 8
ALONE_EVERY = 4
WORDS = ("cat", "rocket", "guitar", "penguin", "red apple")
SIZES = ("64x64", "32x32", "48x64")
CACHES: tuple[Any, ...] = ("off", "fast", {"threshold": 0.2}, {"speedup": 2.0})


def body(index: int) -> dict[str, Any]:
    """Request `index`: its two neighbours, and whoever is its pair, differ from it in everything."""
    return {
        "prompt": f"{WORDS[index % 5]} marker{index}",
        "seed": 7_000_000 + index,
        "size": SIZES[index % 3],
        "steps": 4 + index % 4,
        "cache": CACHES[index % 4],
        "guidance_scale": 1.0 + index % 7 / 2,
        "user": f"user{index}",
    }


def wrongs(index: int, reply: httpx.Response) -> list[str]:
    """What in a reply is not its own."""
    asked, told = body(index), reply.json()
    image = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
    file, facts = json.loads(image.info["vllm_omni"]), told["omni"]["images"][0]
    width, height = map(int, asked["size"].split("x"))
    cache = facts["cache"]
    own = {
        "header": reply.headers["x-request-id"] == f"marked-{index}",
        "id": told["omni"]["request_id"] == f"marked-{index}",
        "prompt": file["prompt"] == asked["prompt"],
        "seed": file["seed"] == facts["seed"] == told["data"][0]["seed"] == asked["seed"],
        "size": image.size == (width, height) and told["size"] == asked["size"],
        "steps": facts["num_inference_steps"] == asked["steps"] == len(facts["plan"] or [0] * asked["steps"]),
        "counts": facts["computed_steps"] + facts["skipped_steps"] == asked["steps"],
        "guidance": file["guidance_scale"] == asked["guidance_scale"],
        "cache": file["cache"] == asked["cache"] and (cache == "off") == (asked["cache"] == "off"),
        "settings": not isinstance(asked["cache"], dict) or asked["cache"].items() <= cache.items(),
        "text": set(re.findall(r"(?:marker|marked-|user)(\d+)", reply.text + str(image.info))) == {str(index)},
    }
    return [name for name, good in own.items() if not good]


def picture(reply: httpx.Response) -> np.ndarray:
    return web.pixels(reply.text)


async def main(url: str, pairs: int) -> dict[str, Any]:
    found: Counter[str] = Counter()
    pictures: dict[int, np.ndarray] = {}
    worst = differ = 0
    async with web.client(url, 2 * PAIRS_AT_ONCE) as client:

        async def one(index: int) -> httpx.Response:
            reply = await client.post(web.IMAGES, json=body(index), headers={"X-Request-Id": f"marked-{index}"})
            assert reply.status_code == 200, reply.text
            return reply

        turns = iter(range(pairs))

        async def some_pairs() -> None:
            for pair in turns:
                both = 2 * pair, 2 * pair + 1
                for index, reply in zip(both, await asyncio.gather(*map(one, both)), strict=True):
                    found.update(wrongs(index, reply))
                    pictures[index] = picture(reply)

        began = time.monotonic()
        await asyncio.gather(*(some_pairs() for _ in range(PAIRS_AT_ONCE)))
        seconds = time.monotonic() - began
        before = web.metrics(url)
        for index in range(0, 2 * pairs, ALONE_EVERY):
            away = int(np.abs(pictures[index] - picture(await one(index))).max())
            worst, differ = max(worst, away), differ + (away > 0)
    finished = before["vllm:request_success_total finished"]
    gauges = web.gauges(url)
    distinct = len({picture.tobytes() for picture in pictures.values()})
    return {
        "pairs": pairs,
        "answered": len(pictures),
        "counted_finished": int(finished),
        "not_its_own": dict(found),
        "distinct_pictures": distinct,
        "against_alone": [2 * pairs // ALONE_EVERY, differ, worst],  # how many, how many differ, by most of 255
        "seconds_together": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "gauges_after": gauges,
        "ok": len(pictures) == distinct == finished == 2 * pairs and not found and worst <= 1 and not any(gauges),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    args = parser.parse_args()
    with web.command() as server:
        told = asyncio.run(main(server.url, args.pairs))
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)
