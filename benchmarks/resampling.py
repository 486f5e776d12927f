"""Curves of the same model at several step counts: does resampling one give the other? Interpolated against nearest.

The curves come from a JSON file with "entries", each with "model", "resolution", "steps", "ratios" (one per step, the
first step's 1 left out or not) or "ratios_cond". Root mean square error of gamma, and how many more steps MagCache's
rule at the paper's settings (0.24, K 5, rho 0.1) skips on the resampled curve than on the measured one.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np

from vllm_omni.diffusion.cache.plan.curve import resample
from vllm_omni.diffusion.cache.plan.rule import magcache_plan

Pair = tuple[float, float, int, int]  # errors of nearest and log, differences in skipped steps of nearest and log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    entries = json.loads(parser.parse_args().curves.read_text())["entries"]
    found: dict[tuple[str, str, int, int], list[Pair]] = defaultdict(list)
    for first, second in permutations(entries, 2):
        if first["steps"] != second["steps"] and _kind(first) == _kind(second):
            family = first["model"].removesuffix("-F1"), first["provenance"].split(" (")[0]
            found[(*family, first["steps"], second["steps"])].append(compare(_curve(first), _curve(second)))
    print(
        f"{'model':28} {'from -> to':>10} {'pairs':>5} {'nearest':>8} {'log':>8}   skipped steps: nearest, log (worst)"
    )
    for (model, _, source, target), pairs in found.items():
        nearest, log, more_nearest, more_log = zip(*pairs, strict=True)
        worst = [max(more, key=abs) for more in (more_nearest, more_log)]
        errors = f"{np.mean(nearest):8.4f} {np.mean(log):8.4f}"
        print(f"{model:28} {source:4} -> {target:2} {len(pairs):5} {errors}   {worst[0]:+d}, {worst[1]:+d}")
    every = [pair for pairs in found.values() for pair in pairs]
    figures = {
        "pairs": len(every),
        "log_nearer": sum(log < nearest for nearest, log, _, _ in every),
        "rmse_nearest": float(np.mean([pair[0] for pair in every])),
        "rmse_log": float(np.mean([pair[1] for pair in every])),
        "skips_off_nearest": float(np.mean([abs(pair[2]) for pair in every])),
        "skips_off_log": float(np.mean([abs(pair[3]) for pair in every])),
    }
    print(json.dumps({"benchmark": "resampling", **figures}))


def compare(source: list[float], measured: list[float]) -> Pair:
    """`source` brought to the steps of `measured`, both ways."""
    errors, more = [], []
    skips = magcache_plan(measured, 0.24, 5, 0.1).count(False)
    for method in ("nearest", "log"):
        made = resample(source, len(measured), method)
        errors.append(float(np.sqrt(np.mean((np.array(made[1:]) - measured[1:]) ** 2))))
        more.append(magcache_plan(made, 0.24, 5, 0.1).count(False) - skips)
    return errors[0], errors[1], more[0], more[1]


def _kind(entry: dict[str, object]) -> tuple[object, ...]:
    return entry["model"], entry["resolution"], entry["provenance"], entry["guidance"]


def _curve(entry: dict[str, object]) -> list[float]:
    ratios = entry.get("ratios_cond") or entry["ratios"]
    assert isinstance(ratios, list) and isinstance(entry["steps"], int)
    return [1.0] * (entry["steps"] - len(ratios)) + ratios


if __name__ == "__main__":
    main()
