"""Promises in seconds on an idle machine: how long requests really took, against what they were promised.

A few requests alone, with a cache, teach the engine its pace. Then promises from a third of an uncached request's time
to all of it, in turn, several rounds; the figure is the median over rounds of seconds taken ÷ seconds promised.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from common import begin, last_line, table

SHARES = (0.4, 0.5, 0.6, 0.8, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.set_defaults(clock="wall")
    options = parser.parse_args()
    machine = begin(options)
    rows, worst = measure(options)
    table(["share of uncached", "promised s", "taken s", "taken ÷ promised", "full forwards"], rows)
    last_line({"benchmark": "seconds", **machine, "steps": options.steps, "worst_deviation": worst})


def measure(options: Any) -> tuple[list[list[str]], float]:
    """The table's rows, and the largest deviation of a median from its promise."""
    from vllm_omni import Omni

    with Omni(options.model, dtype="float32", cache_backend="magcache") as omni:
        for _ in range(3):
            take(omni, options.steps, {"speedup": 2.0})
        uncached = statistics.median(take(omni, options.steps, "off")[0] for _ in range(options.rounds))
        promised = {share: share * uncached for share in SHARES}
        taken: dict[float, list[tuple[float, int]]] = {share: [] for share in SHARES}
        for _ in range(options.rounds):
            for share, seconds in promised.items():
                taken[share].append(take(omni, options.steps, {"seconds": seconds}))
    rows, worst = [], 0.0
    for share, seconds in promised.items():
        middle = statistics.median(took for took, _ in taken[share])
        forwards = sorted({nfe for _, nfe in taken[share]})
        worst = max(worst, abs(middle / seconds - 1))
        many = "-".join(map(str, dict.fromkeys((forwards[0], forwards[-1]))))
        rows.append([f"{share:.2f}", f"{seconds:.3f}", f"{middle:.3f}", f"{middle / seconds:.3f}", many])
    return rows, worst


def take(omni: Any, steps: int, cache: Any) -> tuple[float, int]:
    """Seconds of one request alone, and its full forwards."""
    from vllm_omni import OmniDiffusionSamplingParams

    params = OmniDiffusionSamplingParams(num_inference_steps=steps, seed=1, cache=cache, output_type="np")
    began = time.perf_counter()
    output = omni.generate(["red apple"], [params], use_tqdm=False)[0]
    if output.error is not None:
        raise output.error
    return time.perf_counter() - began, output.computed_steps


if __name__ == "__main__":
    main()
