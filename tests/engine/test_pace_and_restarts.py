"""Planned seconds of requests, when refused ones should return, and pauses between restarts."""

from __future__ import annotations

import pytest

from vllm_omni.engine import cost
from vllm_omni.engine.supervisor import Restarts


def test_planned_seconds_follow_what_was_measured() -> None:
    costs = cost.no_costs()
    assert cost.planned_seconds(costs, 4096, 10, 0) == 10 * cost.UNKNOWN_ROW_S
    cost.note(costs.computed, 4096, 0.1)
    cost.note(costs.skipped, 4096, 0.01)
    cost.note(costs.ends, 4096, 0.5)
    assert cost.planned_seconds(costs, 4096, 10, 20) == pytest.approx(1.0 + 0.2 + 0.5)
    assert cost.planned_seconds(costs, 8192, 10, 0) == pytest.approx(2.0 + 1.0)  # in proportion to the pixels
    for _ in range(200):
        cost.note(costs.computed, 4096, 0.2)
    assert costs.computed[4096] == pytest.approx(0.2, rel=1e-3)
    for _ in range(500):  # forwards of 16 rows in 1.6 s and of one in 0.4 s: 17 rows in 2 s, not 0.25 s a row
        cost.note_rows(costs.computed, 4096, 1.6, 16)
        cost.note_rows(costs.computed, 4096, 0.4, 1)
    assert costs.computed[4096] == pytest.approx(2.0 / 17, rel=0.03)
    for pixels in range(1000):
        cost.note(costs.computed, pixels, 1.0)
    assert len(costs.computed) == 64


def test_refused_requests_are_told_to_return_one_after_another() -> None:
    promised, told = 0.0, []
    for _ in range(20):
        promised = cost.come_back(100.0, promised, 2.0, 16.0)
        told.append(promised - 100.0)
    assert told == [2.0 * (i + 1) for i in range(8)] + [16.0] * 12


def test_restarts_pause_longer_and_stop() -> None:
    restarts = Restarts(4, 100.0)
    served = [True, False, False, True, True]
    assert [restarts.pause(now, s) for now, s in enumerate(served)] == [0.0, 0.5, 1.0, 0.0, None]
    assert restarts.pause(150, True) == 0.0 and restarts.count == 5
