"""Runs every benchmark, keeps their last lines in benchmarks/results/, and writes the table of docs/performance.md.

`--quick` takes at most ten minutes on two cores; the figures it gives are noisier. A table row is written only from a
result that exists, so a single benchmark can be run again with `--only`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: written by benchmarks/run_all.py -->", "<!-- end of measured -->"

# name: (script, its arguments, its arguments with --quick)
RUNS: dict[str, tuple[str, str, str]] = {
    "efficiency": ("efficiency", "--repeats 9", "--repeats 5 --seconds 40 --sizes small large-72"),
    "tax": ("tax", "", "--repeats 3"),
    "batching-float32": ("batching", "", "--repeats 2"),
    "batching-bfloat16": ("batching", "--dtype bfloat16", "--repeats 2 --dtype bfloat16"),
    "batching-compute-bound": (
        "batching",
        "--size large-1088 --requests 4 --min-steps 6 --max-steps 12 --repeats 3",
        "--size large-1088 --requests 2 --min-steps 6 --max-steps 8 --repeats 2",
    ),
    "load": ("load", "", "--repeats 2 --requests 16 --clients 16 --open-loads"),
    "memory": ("memory", "", "--concurrent 1 16"),
    "growth": ("growth", "--plot docs/images/growth.png", "--repeats 1 --plot docs/images/growth.png"),
    "startup": ("startup", "", "--repeats 3"),
    "ops": ("ops", "", "--repeats 3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, at most ten minutes on two cores")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the table from the results kept")
    parser.add_argument(
        "--each",
        default="",
        help='arguments for every script, such as "--threads 1 --clock cpu" on a machine that is busy',
    )
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    failed = [] if options.table_only else [name for name in options.only if not run(name, options.quick, options.each)]
    results = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))}
    write_table(results)
    if "load" in results:
        plot_load(results["load"])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(name: str, quick: bool, each: str) -> bool:
    """One benchmark in a process of its own; its table is shown, its last line kept."""
    script, full, fast = RUNS[name]
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "benchmarks" / f"{script}.py"),
        *f"{fast if quick else full} {each}".split(),
    ]
    print(f"== {' '.join(command[3:])}", flush=True)
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[:-1]), flush=True)
    if done.returncode or not lines:
        print(done.stderr[-3000:], flush=True)
        return False
    result = json.loads(lines[-1]) | {
        "quick": quick,
        "arguments": " ".join(command[4:]),
        "seconds": round(time.perf_counter() - began, 1),
        "date": time.strftime("%Y-%m-%d"),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return True


def write_table(results: dict[str, Any]) -> None:
    """Put the table between the markers of `PAGE`."""
    rows = [row for name, make in ROWS for row in (make(results[name]) if name in results else [])]
    if not rows:
        return
    device = next(iter(results.values()))["device"]
    quick = ", some from `--quick`" if any(r.get("quick") for r in results.values()) else ""
    lines = [
        BEGIN,
        "",
        f"On {device}, by `benchmarks/run_all.py`{quick}; ratios within one run.",
        "",
        "| what | figure |",
    ]
    lines += ["|---|---|", *(f"| {what} | {figure} |" for what, figure in rows), "", END]
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + "\n".join(lines) + rest.split(END)[1], encoding="utf-8")


Row = tuple[str, str]


def _efficiency(result: dict[str, Any]) -> list[Row]:
    rows = []
    for size in result["sizes"].values():
        figures = {name: f"{v['efficiency']:.2f}" for name, v in size["variants"].items() if name != "uncached"}
        size_of = f"{size['parameters'] / 1e6:.1f} M parameters, {size['ms_per_step']:.0f} ms"
        what = f"speed-up ÷ (total ÷ computed blocks), {size_of}"
        rows.append((what, ", ".join(f"{name} {figure}" for name, figure in figures.items())))
    return rows


def _tax(result: dict[str, Any]) -> list[Row]:
    beyond = result["parked"]["us_per_call_beyond"]
    return [
        ("solo request through the engine over plain diffusers, uncached", f"{result['solo']['ratio']:.3f}×"),
        ("per parked call beyond pipeline and model, 16 requests", f"{beyond:.0f} µs"),
    ]


def _batching(result: dict[str, Any]) -> list[Row]:
    what = f"{result['requests']} mixed requests over diffusers' MagCache one by one, equal forwards, {result['model']}"
    figure = f"{result['throughput_ratio']:.2f}×, {result['ratio_over_limit']:.2f} of the batching limit"
    return [(f"{what}, {result['dtype']}", figure)]


def _load(result: dict[str, Any]) -> list[Row]:
    load = max((x for x in result["loads"] if x["loop"] == "closed"), key=lambda x: x["amount"] == 16)
    return [
        (
            f"{load['amount']} clients, closed loop: the engine's throughput over {name}",
            f"{f['engine_times']:.2f}×; {result['rows_computed'][name]:.2f} of all blocks computed",
        )
        for name, f in load["systems"].items()
        if name != "engine"
    ]


def _growth(result: dict[str, Any]) -> list[Row]:
    figures = (f"{name} {curve['cached_exponent']:.2f}" for name, curve in result["sweeps"].items())
    return [("cached time grows with x^b in", ", ".join(figures))]


def _ops(result: dict[str, Any]) -> list[Row]:
    times = [case["times_twin"] for case in result["cases"]]
    return [("native forecast in bfloat16 over its torch twin", f"{min(times):.2f} to {max(times):.2f}×")]


def _memory(result: dict[str, Any]) -> list[Row]:
    figures = (f"{c['predictor']} {c['residuals']:.2g}" for c in result["by_predictor"] if c["kept"] == "model")
    return [("residuals held at most per request and branch", ", ".join(figures))]


def _startup(result: dict[str, Any]) -> list[Row]:
    own = result["import vllm_omni"] - result["python alone"]
    return [
        (
            "`import vllm_omni`; load the demo; first picture",
            f"{own:.2f} s; {result['load']:.1f} s; {result['first picture']:.1f} s",
        )
    ]


ROWS: list[tuple[str, Callable[[dict[str, Any]], list[Row]]]] = [
    ("efficiency", _efficiency),
    ("tax", _tax),
    ("batching-float32", _batching),
    ("batching-bfloat16", _batching),
    ("batching-compute-bound", _batching),
    ("load", _load),
    ("memory", _memory),
    ("growth", _growth),
    ("startup", _startup),
    ("ops", _ops),
]


def plot_load(result: dict[str, Any]) -> None:
    """Throughput and 95th percentile over the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    closed = [load for load in result["loads"] if load["loop"] == "closed"]
    clients = [load["amount"] for load in closed]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in closed[-1]["systems"]:
        for axis, key in zip(axes, ("pictures_per_s", "p95_s"), strict=True):
            axis.plot(clients, [x["systems"].get(name, {}).get(key, float("nan")) for x in closed], "o-", label=name)
    for axis, label in zip(axes, ("pictures per second", "95th percentile of latency, s"), strict=True):
        axis.set(xlabel="concurrent clients", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(clients, [str(count) for count in clients])
        axis.xaxis.minorticks_off()
    axes[1].legend(fontsize=7)
    figure.savefig(IMAGES / "load.png", dpi=110)


if __name__ == "__main__":
    main()
