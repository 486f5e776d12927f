"""The benchmarks' own logic: command lines, arithmetic, and the table that goes into docs/performance.md."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from lanes import lane
from paths import ROOT

SCRIPTS = sorted(p for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "common")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize(
    "script", lane(SCRIPTS, lambda script: script.stem in ("tax", "batching")), ids=lambda p: p.stem
)
def test_every_script_explains_itself(script) -> None:
    run = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "usage:" in run.stdout and len(run.stdout) > 300


def test_run_all_runs_scripts_that_exist_with_arguments_they_take(benchmark) -> None:
    run_all = benchmark("run_all")
    for script, full, fast in run_all.RUNS.values():
        text = (ROOT / "benchmarks" / f"{script}.py").read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        for option in (word for word in f"{full} {fast}".split() if word.startswith("--")):
            assert f'"{option}"' in text, (script, option)


def test_skips_first_needs_no_more_full_forwards_than_the_request_that_computes_most(benchmark) -> None:
    alignment = benchmark("alignment")
    plans = [alignment.plan_of(alignment.STEPS[(3 * i) % 4]) for i in range(16)]
    ours = alignment.serve(plans, 0, "ours: skips first")
    assert ours["forwards"] == max(sum(plan) for plan in plans)
    assert ours["rows"] == sum(sum(plan) for plan in plans)
    assert ours["forwards"] < alignment.serve(plans, 0, "oldest first")["forwards"]
    assert ours["longest_wait"] <= 6  # at most five skips in a row, and the forward that was under way


def test_the_simulated_peer_queue_is_first_come_first_served(benchmark) -> None:
    load = benchmark("load")
    services = {"diffusers, own MagCache": [[1.0, 2.0, 1.0, 1.0]]}
    total, latencies = load._queue(("closed", 2), [1.0, 2.0, 1.0, 1.0], services, 0)
    assert total == 5.0
    assert latencies == [1.0, 3.0, 3.0, 2.0]  # the third asks when the first is done, the fourth when the second is


def test_static_batches_take_those_of_equal_steps_that_wait(benchmark) -> None:
    load = benchmark("load")
    requests = [("a", steps, seed) for seed, steps in enumerate((10, 20, 10, 20, 10, 10))]
    served: list[list[int]] = []
    total, latencies = load.serve_static(lambda batch: served.append([seed for _, _, seed in batch]), requests, 4)
    assert served == [[0, 2], [1, 3], [4, 5]]
    assert len(latencies) == len(requests) and max(latencies) <= total


def test_seconds_by_step_are_each_steps_fastest_round(benchmark, monkeypatch) -> None:
    common = benchmark("common")
    rounds = iter([[9, 9, 9], [5, 1, 2], [1, 4, 2]])  # seconds of three parts; the first round warms up
    clock = 0.0

    def now() -> float:
        return clock

    def job() -> None:
        nonlocal clock
        first, second, last = next(rounds)
        for part in (first, second):
            clock += part
            stamps.append(now())
        clock += last

    stamps: list[float] = []
    monkeypatch.setattr(common, "now", now)
    seconds, whole = common.by_step({"job": job}, 2, stamps)["job"]
    assert seconds == 1 + 1 + 2
    assert whole.seconds == [8, 7]


def test_table_rows_come_from_results_between_the_markers(benchmark, tmp_path, monkeypatch) -> None:
    run_all = benchmark("run_all")
    page = tmp_path / "performance.md"
    page.write_text(f"above\n{run_all.BEGIN}\nold\n{run_all.END}\nbelow\n", encoding="utf-8")
    monkeypatch.setattr(run_all, "PAGE", page)
    tax = {"device": "CPU, 2 cores", "parked": {"us_per_call_beyond": 42.4}, "solo": {"ratio": 1.0123}}
    run_all.write_table({"tax": tax})
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "1.012×" in text and "42 µs" in text
    run_all.write_table({"tax": tax})
    assert page.read_text(encoding="utf-8") == text


def test_kept_results_equal_the_table(benchmark) -> None:
    run_all = benchmark("run_all")
    results = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in run_all.RESULTS.glob("*.json")}
    page = run_all.PAGE.read_text(encoding="utf-8")
    assert results, "benchmarks/run_all.py was never run"
    for name, make in run_all.ROWS:
        for what, figure in make(results[name]) if name in results else []:
            assert f"| {what} | {figure} |" in page, "run benchmarks/run_all.py --table-only"
