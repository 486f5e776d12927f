"""The simulated engines do what arithmetic says, lose nothing, and the rule of the real pool beats counting."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT

from vllm_omni.replicas.routing import MOST_AGAIN, choose
from vllm_omni.replicas.scaling import Window, wanted_replicas


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import simulate

    return simulate


def costs(simulator: Any, **more: Any) -> Any:
    return simulator.Costs(
        {1: 1.0, 4: 2.0}, {1: 0.1, 4: 0.1}, {1: 0.0, 4: 0.0}, **{"unshared": 0.5, "places": 4} | more
    )


def ends(simulator: Any, front: Any, arrivals: list[tuple[float, Any]]) -> list[float]:
    return [round(job.ended, 6) for job in sorted(front.run(arrivals), key=lambda job: job.arrived)]


def test_one_engine_ends_requests_when_arithmetic_says(simulator: Any) -> None:
    work = simulator.Work
    front = simulator.Front(costs(simulator), 1, choose)
    # alone for 5 s; then two rows at 1.5 s a forward until the first has had 10
    assert ends(simulator, front, [(0.0, work(1, 10, 1.0)), (5.0, work(1, 10, 1.0))]) == [12.5, 17.5]
    front = simulator.Front(costs(simulator), 1, choose)
    # sizes take turns: a round is 1 + 2 s; the second has had 5 forwards after 15 s, the first 5, and goes on alone
    assert ends(simulator, front, [(0.0, work(1, 10, 1.0)), (0.0, work(4, 5, 1.0))]) == [20.0, 15.0]
    front = simulator.Front(costs(simulator, places=1), 1, choose)
    # one runs and one waits at the engine; of those that wait at the front, the last has a turn ten seconds earlier
    waiting = [(0.0, work(1, 10, 1.0)), (1.0, work(1, 10, 1.0)), (2.0, work(1, 10, 1.0)), (3.0, work(1, 10, 1.0, -2))]
    assert ends(simulator, front, waiting) == [10.0, 20.0, 40.0, 30.0]
    assert work(1, 10, 0.5).seconds(costs(simulator)) == pytest.approx(5.5)
    front = simulator.Front(costs(simulator), 1, choose)
    # five forwards of two rows, and what nobody shares: five skips of each
    assert ends(simulator, front, [(0.0, work(1, 10, 0.5))] * 2) == [5 * 1.5 + 2 * 0.5] * 2
    front = simulator.Front(costs(simulator, unshared_of={1: 1.0}), 1, choose)
    assert ends(simulator, front, [(0.0, work(1, 10, 1.0))] * 2) == [20.0, 20.0]


@pytest.mark.parametrize("rule", ["round-robin", "least count", "least queued seconds", "least added delay"])
def test_nothing_is_lost_when_engines_die_and_nobody_is_asked_a_fourth_time(simulator: Any, rule: str) -> None:
    draw = random.Random(3)
    arrivals = [(0.2 * i, simulator.some_work(draw)) for i in range(600)]
    front = simulator.Front(simulator.DEMO, 4, simulator.RULES[rule](), mean_life=15.0)
    jobs = front.run(arrivals)
    assert len(jobs) == 600 and front.deaths > 10
    assert all(job.ended < float("inf") and job.taken <= MOST_AGAIN + 1 for job in jobs)
    assert any(job.taken > 1 for job in jobs) and sum(job.failed for job in jobs) < 10


def test_the_rule_of_the_pool_is_the_best_of_the_four(simulator: Any) -> None:
    cases = simulator.compare_rules(simulator.DEMO, [6], 0.8, 150, 900, 5)
    means = {case["rule"]: case["mean"] for case in cases if case["shape"] == "steady"}
    assert min(means, key=lambda rule: means[rule]) == "least added delay"
    assert means["least added delay"] < 0.7 * means["round-robin"]


def test_more_replicas_come_when_work_is_queued_and_go_when_it_is_not(simulator: Any) -> None:
    burst = [(0.05 * i, simulator.Work(16384, 50, 1.0)) for i in range(200)]
    later = [(200.0 + i, simulator.Work(4096, 10, 1.0)) for i in range(200)]
    scaling = simulator.Scaling("seconds", 5.0, 1, 8)
    front = simulator.Front(simulator.DEMO, 1, choose, scaling=scaling)
    jobs = front.run([*burst, *later])
    assert all(job.ended < float("inf") for job in jobs) and len(jobs) == 400
    assert len([one for one in front.engines if not one.leaving]) == 1  # at the end
    assert max(job.ended for job in jobs[:200]) < 90  # one engine takes 380 s
    assert 400 < front.replica_seconds < 8 * 400  # fewer than always all, more than always one


def test_how_many_are_wanted() -> None:
    assert [wanted_replicas(left, 30.0, 1, 8) for left in (0.0, 29.0, 31.0, 100.0, 1e9)] == [1, 1, 2, 4, 8]
    window = Window(60.0)
    assert [window.note(now, number) for now, number in ((0, 1), (10, 5), (20, 2), (60, 2), (71, 2))] == [1, 5, 5, 5, 2]


@pytest.mark.slow
def test_the_table_and_the_last_line(simulator: Any) -> None:
    words = ["--replicas", "2", "--each", "40", "--seed", "1"]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "simulate.py", *words], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert json.loads(lines[-1])["benchmark"] == "simulate"
    assert sum(line.startswith("| 2 | ") and "round-robin" in line for line in lines) == 3
