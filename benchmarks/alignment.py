"""What the scheduler's order is worth: real plans through the real scheduler, forwards counted, nothing computed.

Requests of mixed steps run the demo's plans under three orders: ours (skips first, then the compute group that waits
longest), oldest first whatever it is, and compute steps first. Time is modelled: a computed forward of r rows costs
`fixed + r * row`, a skipped one a twentieth of that. Launch-bound: all of it fixed; compute-bound: all by rows.
"limit" is what no order can beat: as many forwards as the request that computes most, and every row computed once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from common import last_line, table

STEPS = (10, 20, 28, 50)
COSTS = {"launch-bound": (1.0, 0.0), "half and half": (0.5, 0.5), "compute-bound": (0.0, 1.0)}
SKIP = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16, help="concurrent (default %(default)s)")
    parser.add_argument("--staggered", type=int, default=3, help="ticks between arrivals (default %(default)s)")
    options = parser.parse_args()
    plans = [plan_of(STEPS[(3 * i) % len(STEPS)]) for i in range(options.requests)]
    limit_forwards = max(sum(plan) for plan in plans)
    computed = sum(sum(plan) for plan in plans)
    cases: list[dict[str, Any]] = []
    for every in dict.fromkeys((0, options.staggered)):
        for name in ORDERS:
            arrivals = f"every {every} ticks" if every else "together"
            cases.append({"order": name, "arrivals": arrivals} | serve(plans, every, name))
    rows = []
    for case in cases:
        forwards, skips = case["forwards"], case["skips"]
        for cost, (fixed, row) in COSTS.items():
            seconds = forwards * fixed + computed * row + SKIP * (skips * fixed + case["skip_rows"] * row)
            case[cost] = seconds / (limit_forwards * fixed + computed * row)
        costs = [case[cost] for cost in COSTS]
        rows.append([case["order"], case["arrivals"], forwards, computed / forwards, case["longest_wait"], *costs])
    headers = ["order", "arrivals", "full forwards", "rows each", "longest wait, ticks"]
    headers += [f"{cost}, of limit" for cost in COSTS]
    table(headers, rows)
    last_line({"benchmark": "alignment", "device": "none: counted", "limit_forwards": limit_forwards, "cases": cases})


def plan_of(steps: int) -> tuple[bool, ...]:
    """The demo's plan for so many steps under the default rule."""
    from vllm_omni.diffusion.cache.plan.curve import resample
    from vllm_omni.diffusion.cache.plan.rule import magcache_plan
    from vllm_omni.diffusion.cache.profile import shipped_profile

    return magcache_plan(resample(shipped_profile("demo").ratios, steps), 0.24, 5, 0.1)


def ours(parked: dict[str, tuple[bool, int]]) -> tuple[bool, int]:
    return min(parked.values(), key=lambda p: (not p[0], p[1]))


def oldest(parked: dict[str, tuple[bool, int]]) -> tuple[bool, int]:
    return min(parked.values(), key=lambda p: p[1])


def compute_first(parked: dict[str, tuple[bool, int]]) -> tuple[bool, int]:
    return min(parked.values(), key=lambda p: (p[0], p[1]))


ORDERS = {"ours: skips first": ours, "oldest first": oldest, "compute first": compute_first}


def serve(plans: list[tuple[bool, ...]], every: int, order: str) -> dict[str, Any]:
    """Run the plans to their ends; request i arrives at tick i * every."""
    from vllm_omni.diffusion.scheduler import StepKind, StepScheduler

    turns = {True: StepKind.COMPUTE, False: StepKind.SKIP}
    scheduler = StepScheduler(len(plans))
    at = dict.fromkeys(map(str, range(len(plans))), 0)
    since: dict[str, int] = {}
    counts: Counter[str] = Counter()
    tick = came = 0
    while at:
        while came < len(plans) and came * every <= tick:
            scheduler.add(str(came))
            came += 1
        for request in scheduler.admit():
            scheduler.park(request, "key", turns[plans[int(request)][0]])
            since[request] = tick
        if order.startswith("ours"):
            batch = scheduler.schedule()
        else:
            parked = {r: (not plans[int(r)][at[r]], since[r]) for r in since}
            skips = ORDERS[order](parked)[0] if parked else False
            batch = [r for r, (s, _) in parked.items() if s == skips]
        tick += 1
        if not batch:
            continue
        computes = plans[int(batch[0])][at[batch[0]]]
        counts["forwards" if computes else "skips"] += 1
        counts["rows" if computes else "skip_rows"] += len(batch)
        for request in batch:
            counts["longest_wait"] = max(counts["longest_wait"], tick - since[request])
            at[request] += 1
            since[request] = tick
            if at[request] == len(plans[int(request)]):
                del at[request], since[request]
                scheduler.remove(request)
            else:
                scheduler.park(request, "key", turns[plans[int(request)][at[request]]])
    return dict(counts)


if __name__ == "__main__":
    main()
