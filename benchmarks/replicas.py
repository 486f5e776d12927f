"""Two engines of the demo behind one front: routing rules against each other, what the front adds, and the simulator.

32 clients pause between requests, so that the engines have about `--load` of what they can do; every rule sees the
same requests and pauses, in turn, in rounds. The simulator then runs the same clients with the costs that the engines
have measured meanwhile: its mean and its duration should be the real ones within a tenth (the exit code says so). What
the front adds is the time of one-step requests through a pool of one engine, against the same engine asked directly,
in turn, and the processor time of a choice among two engines that have 16 requests each. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulate import SHARES, SIZES, STEPS, WEIGHTS
from simulator.engine import Costs, Job, Work
from simulator.front import RULES, Front

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.replicas.pool import ReplicaPool, local_pool
from vllm_omni.replicas.routing import Asked, Load, choose

ARGS: dict[str, Any] = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": 16}
PROMPTS = ("red apple", "penguin", "blue car", "pizza", "snowman", "rocket")
CACHES: dict[float, Any] = {1.0: "off", 0.5: {"speedup": 2.0}, 0.35: {"speedup": 1 / 0.35}}
REPLICAS, SAMPLE_S, AWAY = 2, 0.5, 0.1
Script = list[list[tuple[float, Work]]]  # by client: a pause, and what comes after it


def script(requests: int, clients: int, pause: float, seed: int) -> Script:
    """What each client asks, and how long it pauses before; the same in every run of a seed."""
    draw = random.Random(seed)
    return [
        [
            (draw.expovariate(1 / pause), Work(_size(draw), draw.choice(STEPS), draw.choice(SHARES), client=client))
            for _ in range(client, requests, clients)
        ]
        for client in range(clients)
    ]


def _size(draw: random.Random) -> int:
    return draw.choices(SIZES, WEIGHTS)[0]


def params(work: Work, seed: int) -> Params:
    side = int(work.pixels**0.5)
    return Params(
        height=side, width=side, num_inference_steps=work.steps, cache=CACHES[work.share], seed=seed, guidance_scale=3.5
    )


async def real(pool: ReplicaPool, asked: Script, name: str) -> tuple[dict[str, Any], Costs]:
    """The clients against the pool, and what work cost meanwhile: costs change with what a machine does beside."""
    waits: list[float] = []
    seen: list[Costs] = []

    async def client(number: int) -> None:
        for turn, (pause, work) in enumerate(asked[number]):
            await asyncio.sleep(pause)
            began = time.perf_counter()
            wanted = params(work, 100 * number + turn)
            async for output in pool.generate(PROMPTS[number % 6], wanted, f"{name}-{number}-{turn}"):
                if output.finished:
                    assert output.ok, output.error
            waits.append(time.perf_counter() - began)

    async def watch() -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            with suppress(statistics.StatisticsError):  # not every size has run yet
                seen.append(measured(pool))

    began, watcher = time.perf_counter(), asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(len(asked))))
    seconds = time.perf_counter() - began
    watcher.cancel()
    return told(waits, seconds), averaged(seen or [measured(pool)])


def simulated(costs: Costs, asked: Script, rule: str, seed: int) -> dict[str, Any]:
    """The same clients against simulated engines."""
    turns = [iter(one) for one in asked]

    def again(job: Job) -> tuple[float, Work] | None:
        return next(turns[job.work.client], None)

    front = Front(costs, REPLICAS, RULES[rule](), seed, again=again)
    jobs = front.run([next(one) for one in turns])
    return told([job.ended - job.arrived for job in jobs], max(job.ended for job in jobs))


def told(waits: Sequence[float], seconds: float) -> dict[str, Any]:
    ordered = sorted(waits)
    return {
        "mean": statistics.mean(ordered),
        "p50": statistics.median(ordered),
        "p99": ordered[int(0.99 * len(ordered))],
        "seconds": seconds,
        "requests": len(ordered),
    }


def measured(pool: ReplicaPool) -> Costs:
    """What the engines have measured by now, on average. StatisticsError if some size never ran."""
    every = [replica.engine.ledger.costs for replica in pool.replicas]

    def mean(tables: Sequence[dict[int, float]]) -> dict[int, float]:
        return {size: statistics.mean(table[size] for table in tables if size in table) for size in SIZES}

    return Costs(
        row=mean([costs.alone for costs in every]),
        skipped=mean([costs.skipped for costs in every]),
        ends=mean([costs.ends for costs in every]),
        unshared=statistics.mean(costs.unshared for costs in every),
        places=ARGS["max_num_seqs"],
        unshared_of=mean([costs.unshared_of for costs in every]),
    )


def averaged(every: Sequence[Costs]) -> Costs:
    def mean(name: str) -> dict[int, float]:
        return {size: statistics.mean(vars(costs)[name][size] for costs in every) for size in SIZES}

    tables = {name: mean(name) for name in ("row", "skipped", "ends", "unshared_of")}
    return replace(every[0], unshared=statistics.mean(costs.unshared for costs in every), **tables)


async def added(requests: int) -> dict[str, float]:
    """Milliseconds that the front adds to a request of one step, and those of a choice."""
    engine = await ProcessEngineClient(ARGS).start()
    pool = ReplicaPool([engine], 16, 256)
    times: dict[str, list[float]] = {"direct": [], "pool": []}
    for turn in range(requests):
        for name, client in (("direct", engine), ("pool", pool)):
            began = time.perf_counter()
            async for _ in client.generate("x", Params(num_inference_steps=1, seed=0, cache="off"), f"{name}-{turn}"):
                pass
            times[name].append(1e3 * (time.perf_counter() - began))
    await engine.shutdown()
    pairs = [through - direct for direct, through in zip(times["direct"], times["pool"], strict=True)]
    draw = random.Random(0)
    loads = [Load([(draw.random(), draw.choice(SIZES)) for _ in range(16)], 0.5) for _ in range(REPLICAS)]
    began = time.process_time()
    for _ in range(2000):
        choose(loads, Asked(0.5, 4096), draw)
    choice = 1e3 * (time.process_time() - began) / 2000
    return {"direct_ms": statistics.median(times["direct"]), "added_ms": statistics.median(pairs), "choice_ms": choice}


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    async with local_pool(ARGS, REPLICAS) as pool:
        pause = 0.3
        await real(pool, script(96, 32, pause, 99), "warm")
        most, costs = await real(pool, script(96, 32, 0.01, 98), "most")
        rate = 96 / most["seconds"]  # as many as they can
        pause = options.clients / (options.load * rate) - 1.5 / rate * options.clients / 8
        pause = max(0.2, pause)
        print(f"{rate:.1f} requests a second at most; pauses of {pause:.1f} s on average", flush=True)
        for turn in range(options.rounds):
            for rule in options.rules:
                pool._line.choice = RULES[rule]()
                asked = script(options.requests, options.clients, pause, turn)
                found, costs = await real(pool, asked, f"{rule.replace(' ', '-')}-{turn}")
                case = {"rule": rule, "round": turn} | found
                case["simulated"] = simulated(costs, asked, rule, turn)
                cases.append(case)
                ours, theirs = shown(case), shown(case["simulated"])
                print(f"{rule:22} {ours}; simulated {theirs}", flush=True)
    return {"cases": cases, "costs": vars(costs), "most_per_s": rate}


def shown(case: dict[str, Any]) -> str:
    return f"mean {case['mean']:.3f}, p99 {case['p99']:.3f}, all in {case['seconds']:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of each run (default %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--load", type=float, default=0.75, help="(default %(default)s)")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), help="(default: all)")
    parser.add_argument("--write-costs", type=Path, help="a file for `simulate.py --costs`")
    options = parser.parse_args()
    front = asyncio.run(added(100))
    print("the front: " + ", ".join(f"{name} {value:.3f}" for name, value in front.items()), flush=True)
    result = asyncio.run(compare(options))
    by_rule: dict[str, Any] = {}
    for rule in options.rules:
        own = [case for case in result["cases"] if case["rule"] == rule]
        by_rule[rule] = {key: statistics.mean(case[key] for case in own) for key in ("mean", "p99", "seconds")}
        by_rule[rule]["simulated_mean"] = statistics.mean(case["simulated"]["mean"] for case in own)
        by_rule[rule]["simulated_seconds"] = statistics.mean(case["simulated"]["seconds"] for case in own)
    print("| rule | mean s | p99 s | simulated mean s |\n|---|---|---|---|")
    for rule, case in by_rule.items():
        print(f"| {rule} | {case['mean']:.3f} | {case['p99']:.3f} | {case['simulated_mean']:.3f} |")
    away = {rule: case["simulated_mean"] / case["mean"] - 1 for rule, case in by_rule.items()}
    print("simulated mean against the real one: " + ", ".join(f"{rule} {off:+.1%}" for rule, off in away.items()))
    if options.write_costs:
        options.write_costs.write_text(json.dumps(result["costs"]), encoding="utf-8")
    print(json.dumps({"benchmark": "replicas", "device": "cpu", "front": front, "rules": by_rule} | result))
    return int(max(map(abs, away.values())) > AWAY)


if __name__ == "__main__":
    sys.exit(main())
