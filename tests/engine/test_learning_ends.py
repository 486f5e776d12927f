"""How learning ends: it says so, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from teaching import idle_of, learning, learning_of, run_once, teach

from vllm_omni.diffusion.cache.calibration import RecordingState
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.learning import RECENT_S, REQUESTS, Learning

STEPS = 4
pytestmark = pytest.mark.usefixtures("profiles")


def test_after_a_failed_trial_nothing_is_said_to_be_learnt(folder: Path) -> None:
    with learning(folder) as omni:
        teach(omni, STEPS)
        idle = idle_of(omni)
        for _ in range(2):
            run_once(idle, omni)
        assert idle.progress.startswith("gains: 1 of ")
        run_once(idle, omni, lambda output: vars(output).update(error=RuntimeError("not today")))
        assert idle.progress == "" and not idle.wanted and not idle._exact and not idle._results


def test_a_schedule_that_nobody_asks_for_any_more_is_not_said_to_be_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("vllm_omni.learning.time", SimpleNamespace(monotonic=lambda: now))
    learned = Learning("FluxTransformer2DModel", "f" * 32, "m")
    learned.state(Schedule(4, (1.0, 0.8, 0.5, 0.2)), {})
    assert learned.progress == f"0 of {REQUESTS} requests of 4 steps"
    now += RECENT_S
    assert learned.progress == ""


def test_calls_that_show_nothing_are_not_measured_for_ever() -> None:
    """As of a denoiser without blocks that can be looked into."""
    learned, schedule = Learning("FluxTransformer2DModel", "f" * 32, "m"), Schedule(4, (1.0, 0.8, 0.5, 0.2))
    for _ in range(REQUESTS):
        state = learned.state(schedule, {})
        assert isinstance(state, RecordingState)
        for step in range(schedule.steps):
            state.commit(("transformer", "default"), step, state.prepare(("transformer", "default"), step, _Nothing()))  # type: ignore[arg-type]
            state.observe(step, torch.ones(1, 4), None)
        assert not state._calibration._outputs
    assert learned.state(schedule, {}) is None and learned.progress == ""


class _Nothing:
    is_of_rows = True

    def ends(self) -> None:
        return None


def test_no_trials_are_made_where_they_were_ended(folder: Path) -> None:
    with learning(folder) as omni:
        teach(omni, STEPS)
        idle = idle_of(omni)
        assert idle.wanted
        idle.end("the process before this one ended while it had no request")
        assert not idle.wanted and learning_of(omni).over
