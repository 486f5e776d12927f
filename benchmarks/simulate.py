"""What a front of many replicas would do: the real routing function over simulated engines. Pure Python, no model.

Every engine runs up to `places` requests in one batch, taking their sizes in turn: of a forward with r rows each costs
the unshared share of a row by itself, and the rest is paid once. What else comes waits by priority and age. The front
knows what it has sent; what is left of it, as of a report a quarter of a second old. Costs are those of the demo on one
CPU core, or those that `benchmarks/replicas.py` has measured (`--costs`); that script also compares the two on 2
replicas. A request whose engine dies starts over on another one, at most twice.

Tables: routing rules over 8, 100 and 1,000 replicas, steady, with engines that die, and with a burst; autoscaling by
what is left to do against counting; priorities. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulator.engine import Costs, Job, Work
from simulator.front import RULES, Front, Scaling

from vllm_omni.replicas.routing import choose

DEMO = Costs(
    row={4096: 0.010, 9216: 0.020, 16384: 0.036},
    skipped={4096: 0.002, 9216: 0.002, 16384: 0.003},
    ends={4096: 0.02, 9216: 0.04, 16384: 0.08},
)
STEPS, SHARES, SIZES, WEIGHTS = (10, 20, 28, 50), (1.0, 0.5, 0.35), (4096, 9216, 16384), (6, 3, 1)


def some_work(draw: random.Random) -> Work:
    """A request of the mix that `benchmarks/replicas.py` really sends."""
    return Work(draw.choices(SIZES, WEIGHTS)[0], draw.choice(STEPS), draw.choice(SHARES))


def capacity(costs: Costs, draw: random.Random) -> float:
    """Requests a second of one engine whose batch is half full."""
    mean = sum(some_work(draw).seconds(costs) for _ in range(4000)) / 4000
    rows = max(1.0, costs.places / 2)
    return rows / (1 + costs.unshared * (rows - 1)) / mean


def poisson(
    rate: Callable[[float], float], highest: float, until: float, draw: random.Random, levels: Sequence[int] = (0,)
) -> Iterator[tuple[float, Work]]:
    """Arrivals at a rate that changes with time, by thinning those of the highest."""
    time = 0.0
    while (time := time + draw.expovariate(highest)) < until:
        if draw.random() * highest < rate(time):
            yield time, some_work(draw)._replace(priority=draw.choice(levels))


def summary(jobs: Sequence[Job]) -> dict[str, float]:
    waits = sorted(job.ended - job.arrived for job in jobs if not job.failed)
    at = lambda share: waits[min(len(waits) - 1, int(share * len(waits)))]  # noqa: E731
    failed = sum(job.failed for job in jobs)
    again = sum(job.taken > 1 for job in jobs)
    mean = sum(waits) / len(waits)
    return {"mean": mean, "p50": at(0.5), "p99": at(0.99), "failed": failed, "again": again, "requests": len(jobs)}


def compare_rules(
    costs: Costs, sizes: Sequence[int], load: float, each: int, most: int, seed: int
) -> list[dict[str, Any]]:
    """Every rule over as many replicas, steady, with engines of which two in five die, and with a burst."""
    cases = []
    each_s = capacity(costs, random.Random(0))
    for replicas in sizes:
        rate = load * replicas * each_s
        until = min(each * replicas, most) / rate
        shapes = {"steady": (1.0, math.inf), "deaths": (1.0, 2.5 * until), "burst": (2.5, math.inf)}
        for shape, (peak, life) in shapes.items():

            def at(time: float, rate: float = rate, peak: float = peak, until: float = until) -> float:
                return rate * (peak if 0.4 < time / until < 0.5 else 1.0)

            for rule, make in RULES.items():
                front = Front(costs, replicas, make(), seed, mean_life=life)
                jobs = front.run(poisson(at, rate * peak, until, random.Random(seed)))
                case = {"replicas": replicas, "shape": shape, "rule": rule, "deaths": front.deaths}
                cases.append(case | summary(jobs))
    return cases


def compare_scaling(costs: Costs, highest: int, seed: int) -> list[dict[str, Any]]:
    """An hour in which the rate goes up and down: always all replicas, by what is left to do, and by counting."""
    peak, until, cases = 0.7 * highest * capacity(costs, random.Random(0)), 3600.0, []
    mean_s = sum(some_work(random.Random(i)).seconds(costs) for i in range(2000)) / 2000

    def rate(time: float) -> float:
        return peak * (0.15 + 0.85 * math.sin(math.pi * time / until) ** 4)

    ways = {
        "always all": None,
        "queued seconds": Scaling("seconds", 4 * mean_s, 1, highest),
        "count": Scaling("count", 4.0, 1, highest),
    }
    for way, scaling in ways.items():
        front = Front(costs, highest if scaling is None else 1, choose, seed, scaling=scaling)
        jobs = front.run(poisson(rate, peak, until, random.Random(seed)))
        cases.append({"scaling": way, "replica_seconds": front.replica_seconds} | summary(jobs))
    return cases


def compare_priorities(costs: Costs, replicas: int, seed: int) -> list[dict[str, Any]]:
    """Three levels, in a quarter of an hour that begins with more than the engines can do."""
    usual = replicas * capacity(costs, random.Random(0))
    levels = (-2, 0, 2)

    def rate(time: float) -> float:
        return usual * (1.6 if time < 120 else 0.6)

    jobs = Front(costs, replicas, choose, seed).run(poisson(rate, 1.6 * usual, 900.0, random.Random(seed), levels))
    return [{"priority": level} | summary([job for job in jobs if job.work.priority == level]) for level in levels]


def table(title: str, cases: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    print(f"\n{title}\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case in cases:
        print(
            "| " + " | ".join(f"{v:.3g}" if isinstance(v := case[name], float) else str(v) for name in columns) + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 100, 1000], help="(default %(default)s)")
    parser.add_argument(
        "--load", type=float, default=0.8, help="of what half-full batches can do (default %(default)s)"
    )
    parser.add_argument("--each", type=int, default=200, help="requests per replica (default %(default)s)")
    parser.add_argument("--most", type=int, default=20_000, help="requests of one simulation (default %(default)s)")
    parser.add_argument("--unshared", type=float, help="the share that a row in company costs (default: the costs')")
    parser.add_argument("--costs", type=Path, help="JSON with the fields of Costs (default: the demo's)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    options = parser.parse_args()
    costs = read_costs(json.loads(options.costs.read_text(encoding="utf-8"))) if options.costs else DEMO
    if options.unshared is not None:
        costs = Costs(**vars(costs) | {"unshared": options.unshared, "unshared_of": {}})
    rules = compare_rules(costs, options.replicas, options.load, options.each, options.most, options.seed)
    table(
        f"Seconds of a request, load {options.load}, unshared share {costs.unshared}",
        rules,
        ("replicas", "shape", "rule", "mean", "p50", "p99", "requests", "deaths", "again", "failed"),
    )
    scaling = compare_scaling(costs, 16, options.seed)
    table("Autoscaling, at most 16", scaling, ("scaling", "mean", "p99", "replica_seconds", "requests"))
    priorities = compare_priorities(costs, 8, options.seed)
    table(
        "Priorities, 8 replicas, overload in the first 2 minutes", priorities, ("priority", "mean", "p99", "requests")
    )
    result = {"rules": rules, "scaling": scaling, "priorities": priorities, "costs": vars(costs)}
    print(json.dumps({"benchmark": "simulate", "device": "none: simulated"} | result))


def read_costs(data: dict[str, Any]) -> Costs:
    """Costs from JSON, whose keys are texts."""
    names = ("row", "skipped", "ends", "unshared_of")
    tables = {name: {int(key): value for key, value in data.get(name, {}).items()} for name in names}
    return Costs(**data | tables)


if __name__ == "__main__":
    main()
