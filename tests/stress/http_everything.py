"""Everything at once, for minutes: mixed clients, adapters that come and go, embeddings kept, a sleep and a wake.

PYTHONPATH=.:tests/helpers python tests/stress/http_everything.py [--clients 64] [--minutes 5]

The real command serves the demo model. Each client sends the next request when it has its answer: JSON, chat, streams,
files; any adapter or none; any cache setting. Meanwhile adapters are loaded and unloaded, with fewer places than there
are adapters, and half-way the server sleeps and wakes. A request that is told to come back (asleep, or its adapter is
not there) comes back; every other refusal is a failure. Every distinct picture is held against the one made alone
before. A progress line goes to standard error; then a table; the last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import engine_common as common
import http_common as web
import httpx
from adapters import save_adapter
from diffusers import DiffusionPipeline
from http_load import away, mixed

MAX_NUM_SEQS = 16
KINDS = 48  # distinct requests
NAMES = ("ink", "clay", "wax")  # adapters that come and go
PLACES = 3  # for adapters: one is taken by that of start-up
ASKED_AS = ("json", "json", "chat", "stream", "file")
COME_BACK = ("asleep", "not_ready", "lora")
LOADS_ITSELF = 0.1  # the share of clients that load their adapter themselves when it is not there
OPERATE_EVERY_S = 1.5
SLEEP_S = 3.0
HIT, MISS = "vllm_omni:prompt_cache_total hit", "vllm_omni:prompt_cache_total miss"


class Run:
    """What was sent and what came of it."""

    def __init__(self) -> None:
        self.bodies = [
            body | {"user": f"user{i % 4}"} | ({"lora": pick} if pick else {})
            for i, (body, pick) in enumerate(zip(mixed(KINDS), itertools.cycle((None, "own", *NAMES)), strict=False))
        ]
        self.alone: list[bytes] = []
        self.files: dict[tuple[int, str], bytes] = {}  # by kind and digest: the distinct pictures, once each
        self.sent, self.answered, self.told_to_return = 0, Counter[str](), Counter[str]()
        self.failures, self.operations = Counter[str](), Counter[str]()
        self.latencies: list[float] = []
        self.dice = random.Random(7)

    async def ask(self, client: httpx.AsyncClient, kind: int, way: str) -> bytes | None:
        """The picture, however often the server says to come back; None for a failure, which is noted."""
        body = self.bodies[kind]
        path, sent = web.IMAGES, dict(body)
        if way == "chat":
            path, sent = "/v1/chat/completions", {"messages": [{"role": "user", "content": sent.pop("prompt")}]}
            sent |= {"user": body["user"], "extra_body": {k: v for k, v in body.items() if k not in ("prompt", "user")}}
        elif way == "stream":
            sent |= {"stream": True, "partial_images": 1}
        elif way == "file":
            sent |= {"response_format": "file"}
        for _ in range(1000):
            reply = await client.post(path, json=sent)
            last = _last_event(reply) if reply.status_code == 200 and way == "stream" else {}
            if reply.status_code == 200 and "error" not in last:
                return base64.b64decode(last["b64_json"]) if last else _picture(reply, way)
            error = last["error"] if last else reply.json()["error"]
            reason = "lora" if error["param"] in ("lora", "lora_request") else error["code"]
            if reason not in COME_BACK:
                break
            self.told_to_return[reason] += 1
            if reason == "lora" and self.dice.random() < LOADS_ITSELF:
                await self.operate(client, "load", body["lora"])
            else:
                await asyncio.sleep(float(reply.headers.get("retry-after", 0.3)))
        self.failures[f"{reply.status_code} {error['code']} {error['param']}"] += 1
        return None

    async def make_alone(self, client: httpx.AsyncClient) -> None:
        """Every kind, one request at a time, each adapter loaded for its turn."""
        self.alone = [b""] * KINDS
        for name in (None, "own", *NAMES):
            if name in NAMES:
                await self.operate(client, "load", str(name))
            for kind in (k for k, body in enumerate(self.bodies) if body.get("lora") == name):
                self.alone[kind] = await self.ask(client, kind, "json") or b""
            if name in NAMES:
                await self.operate(client, "unload", str(name))
        assert all(self.alone), self.failures

    async def operate(self, client: httpx.AsyncClient, what: str, name: str) -> None:
        path = f"/v1/{what}_lora_adapter"
        body = {"lora_name": name} | ({"lora_path": name} if what == "load" else {})
        reply = await client.post(path, json=body)
        code = "done" if reply.status_code == 200 else reply.json()["error"]["code"]
        self.operations[f"{what} {code}"] += 1

    async def clients(self, client: httpx.AsyncClient, count: int, end: float) -> None:
        turns = itertools.count()

        async def one() -> None:
            while (now := time.monotonic()) < end:
                turn = next(turns)
                kind, way = turn % KINDS, ASKED_AS[turn // KINDS % len(ASKED_AS)]
                self.sent += 1
                try:
                    file = await self.ask(client, kind, way)
                except httpx.HTTPError as error:
                    self.failures[type(error).__name__] += 1
                    continue
                if file is not None:
                    self.answered[way] += 1
                    self.latencies.append(time.monotonic() - now)
                    self.files.setdefault((kind, hashlib.sha256(file).hexdigest()), file)

        await asyncio.gather(*(one() for _ in range(count)))

    async def operator(self, client: httpx.AsyncClient, half: float) -> None:
        """Load and unload at random; sleep and wake once, at `half`."""
        slept = False
        while True:
            await asyncio.sleep(OPERATE_EVERY_S)
            if not slept and time.monotonic() >= half:
                slept = True
                for path, pause in (("/sleep?level=2", SLEEP_S), ("/wake_up", 0.0)):
                    reply = await client.post(path)
                    self.operations[f"{path[1:].partition('?')[0]} {reply.status_code}"] += 1
                    await asyncio.sleep(pause)
            await self.operate(client, self.dice.choice(("load", "unload")), self.dice.choice(NAMES))

    async def progress(self, began: float, minutes: float) -> None:
        while True:
            await asyncio.sleep(1.0)
            seconds, done = time.monotonic() - began, sum(self.answered.values())
            line = f"{seconds:4.0f} of {60 * minutes:.0f} s: {done} answered, {sum(self.failures.values())} failed"
            print(f"\r{line}, {sum(self.operations.values())} operations", end="", file=sys.stderr, flush=True)


def _last_event(reply: httpx.Response) -> dict[str, Any]:
    """Of a stream: the picture, or an error that came when the stream had begun, a second after the request."""
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")][-1]


def _picture(reply: httpx.Response, way: str) -> bytes:
    if way == "file":
        return reply.content
    told = reply.json()
    if way == "chat":
        url = told["choices"][0]["message"]["content"][0]["image_url"]["url"]
        return base64.b64decode(url.partition(",")[2])
    return base64.b64decode(told["data"][0]["b64_json"])


async def main(server: web.Command, clients: int, minutes: float) -> dict[str, Any]:
    run = Run()
    async with web.client(server.url, clients + 2) as client:
        await run.make_alone(client)
        before, memory = web.metrics(server.url), common.rss_mb(server.engine)
        began = time.monotonic()
        tasks = [
            asyncio.create_task(run.operator(client, began + 30 * minutes)),
            asyncio.create_task(run.progress(began, minutes)),
        ]
        await run.clients(client, clients, began + 60 * minutes)
        took = time.monotonic() - began
        for task in tasks:
            task.cancel()
        for name in NAMES:
            await run.operate(client, "unload", name)
    gauges, after = web.gauges(server.url), web.metrics(server.url)
    print(file=sys.stderr)
    differences = [away(file, run.alone[kind]) for (kind, _), file in run.files.items()]
    other = [kind for (kind, _), difference in zip(run.files, differences, strict=True) if difference > 1]
    log = server.log.read_text()
    alarms = [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line or "WARNING" in line]
    answered = sum(run.answered.values())
    told = {
        "clients": clients,
        "minutes": minutes,
        "sent": run.sent,
        "answered": answered,
        "per_s": round(answered / took, 2),
        "latency_s": [common.percentile(run.latencies, share) for share in (0.5, 0.99, 1.0)],
        "by_way": dict(run.answered),
        "told_to_come_back": dict(run.told_to_return),
        "failures": dict(run.failures),
        "operations": dict(run.operations),
        "kinds": KINDS,
        "distinct_pictures": len(run.files),
        "worst_difference_255": max(differences),
        "other_pictures": [run.bodies[kind] for kind in other[:5]],
        "prompt_cache": {name.split()[-1]: int(after[name] - before[name]) for name in (HIT, MISS)},
        "skip_steps": int(after["vllm_omni:denoise_steps_total skipped"]),
        "engine_mb": [round(memory, 1), round(common.rss_mb(server.engine), 1)],
        "restarts": int(after["vllm_omni:worker_restarts_total"]),
        "gauges_after": gauges,
        "log_alarms": alarms[:5],
    }
    good = answered == run.sent and not run.failures and max(differences) <= 1 and not any(gauges) and not alarms
    slept = run.operations["sleep 200"] == run.operations["wake_up 200"] == 1
    came = run.operations["load done"] > len(NAMES) and told["prompt_cache"]["hit"] > 0 and not told["restarts"]
    return told | {"ok": good and slept and came}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        pipeline = DiffusionPipeline.from_pretrained(web.ROOT / "vllm_omni/assets/demo")
        for seed, name in enumerate((*NAMES, "own")):
            save_adapter(pipeline, Path(made) / name, seed)
        del pipeline
        flags = ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-queued-requests", str(args.clients)]
        flags += ["--allowed-model-folders", made, "--max-loras", str(PLACES), "--lora-modules", f"own={made}/own"]
        with web.command(*flags) as server:
            told = asyncio.run(main(server, args.clients, args.minutes))
    for name, value in told.items():
        print(f"{name:22} {value}")
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)
