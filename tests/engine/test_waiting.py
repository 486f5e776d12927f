"""Idle OpenMP threads wait awake on a quiet machine, and asleep where others want the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from vllm_omni.engine import waiting
from vllm_omni.envs import SPINS, spin_briefly

SPENT = """
import time, torch
from vllm_omni.engine.waiting import Crowd, ran_and_waited
numbers, crowd, spent = torch.ones(2**18), Crowd(), []

def seconds():
    numbers.add_(0)
    before = ran_and_waited()[0]
    for _ in range(40):
        numbers.add_(0)
        time.sleep(0.005)
    return ran_and_waited()[0] - before

for act in (lambda: None, crowd.gather, crowd.leave):
    act()
    time.sleep(0.3)
    spent.append(seconds())
print(*spent)
"""


@pytest.mark.alone
def test_a_crowd_lets_idle_threads_sleep_until_it_leaves() -> None:
    """By the seconds that threads run: those which wait awake run all the time."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"GOMP_SPINCOUNT": "10000000", "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run([sys.executable, "-c", SPENT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, crowded, after = map(float, done.stdout.split())
    assert crowded < before / 2 and crowded < after / 2


class Ended(Exception):
    pass


def watched(monkeypatch: pytest.MonkeyPatch, seconds: list[tuple[float, float]]) -> list[bool]:
    """Whether a crowd was there after each check, of seconds that threads ran and waited since the last one."""
    crowd, there, now = waiting.Crowd(), list[bool](), [0.0, 0.0]
    monkeypatch.setattr(crowd, "gather", lambda: vars(crowd).update(_leave=threading.Event()))
    coming = iter(seconds)

    def times() -> tuple[float, float]:
        if now != [0.0, 0.0]:
            there.append(crowd.there)
        if (more := next(coming, None)) is None:
            raise Ended
        now[:] = [now[0] + more[0], now[1] + more[1]]
        return now[0], now[1]

    monkeypatch.setattr(waiting, "ran_and_waited", times)
    monkeypatch.setattr(waiting, "CHECK_S", 0.0)
    with pytest.raises(Ended):
        waiting._watch(crowd)
    return there[1:]


def test_threads_sleep_while_others_want_the_cores_and_for_a_moment_after(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, busy, idle = (0.5, 0.01), (0.3, 0.3), (0.001, 0.02)
    assert watched(monkeypatch, [quiet, quiet, idle, busy, busy]) == [False, False, True, True]
    calm = [quiet] * waiting.CALM_CHECKS
    assert watched(monkeypatch, [quiet, busy, *calm[1:], busy, *calm[1:], idle, quiet, quiet])[-3:] == [
        True,
        False,
        False,
    ]


def test_who_has_said_how_threads_wait_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(waiting, "_watch", started.append)
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: 2)
    for said in ({"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "7"}, {}):
        environment = dict(said)
        spin_briefly(environment)
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        waiting.wait_politely()
        for thread in threading.enumerate():
            if thread.name == "vllm-omni-waiting":
                thread.join()
        assert bool(started) == (environment == {"GOMP_SPINCOUNT": str(SPINS)})
