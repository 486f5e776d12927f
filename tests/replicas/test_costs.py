"""What an engine says of its work to whoever routes: seconds of a row by itself, its share in company, jobs left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm_omni.engine import cost
from vllm_omni.engine.client import ALONE, launch_engine
from vllm_omni.engine.interface import EngineStats
from vllm_omni.engine.ledger import Ledger, RequestSize
from vllm_omni.engine.wire import StatsReport
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.kernels.placement import device_in_turn, see_in_turn


@pytest.mark.parametrize(("fixed", "each"), [(0.8, 0.2), (0.0, 1.0), (1.0, 0.0)])
def test_a_line_finds_what_is_paid_once_and_what_is_paid_per_row(fixed: float, each: float) -> None:
    line = cost.RowLine()
    for turn in range(50):
        rows = 1 + turn % 4
        line.note(rows, fixed + each * rows)
    assert line.fit() == (pytest.approx(fixed + each), pytest.approx(each / (fixed + each), abs=1e-6))


def test_a_line_through_one_point_is_a_guess_and_old_forwards_fade() -> None:
    line = cost.RowLine()
    for _ in range(10):
        line.note(1, 2.0)
    assert line.fit() == (pytest.approx(2.0), cost.UNKNOWN_UNSHARED)
    for turn in range(3000):  # another kernel: rows cost nothing any more
        line.note(1 + turn % 2, 1.0)
    alone, unshared = line.fit()
    assert alone == pytest.approx(1.0, abs=0.01) and unshared < 0.01


def test_lines_are_kept_by_size_and_the_best_known_speaks_for_all() -> None:
    costs, lines = cost.no_costs(), {}
    for pixels in range(100):
        cost.note_line(lines, costs, pixels, 1, 1.0)
    assert len(lines) == len(costs.alone) == 64
    for turn in range(60):
        cost.note_line(lines, costs, 7, 1 + turn % 3, 0.5 + 0.5 * (1 + turn % 3))
    cost.note_line(lines, costs, 8, 4, 9.0)
    assert costs.unshared == pytest.approx(0.5) and costs.alone[7] == pytest.approx(1.0)
    assert costs.unshared_of.keys() == costs.alone.keys() and costs.unshared_of[7] == pytest.approx(0.5)
    costs.computed[7] = 0.3  # per row, in company
    assert cost.planned_seconds(cost.by_itself(costs), 7, 10, 0) == pytest.approx(10.0)
    assert cost.planned_seconds(costs, 7, 10, 0) == pytest.approx(3.0)


def test_the_size_of_a_request_knows_what_its_cache_will_leave() -> None:
    defaults = {"height": 64, "width": 32, "num_inference_steps": 28}
    assert RequestSize.of(Params(), defaults) == RequestSize(64 * 32, 28)
    assert RequestSize.of(Params(cache="off", num_outputs_per_prompt=2), defaults) == RequestSize(2048, 56, 1.0)
    assert RequestSize.of(Params(cache={"speedup": 4.0}, height=8), defaults) == RequestSize(8 * 32, 28, 0.25)
    assert RequestSize.of(Params(cache={"nfe": 7}), defaults).computed == 0.25
    for odd in ("fast", {"speedup": "x"}, {"speedup": 0}, {"nfe": -1}, ["?"], 3):
        assert RequestSize.of(Params(cache=odd), defaults).computed is None


def test_the_load_is_what_was_reported_and_what_was_sent_since() -> None:
    ledger, costs = Ledger(), cost.no_costs()
    costs.computed[100] = 0.1
    costs.unshared = 0.3
    ledger.note(StatsReport(EngineStats(), costs, {"old": (2.5, 100), "ended": (9.0, 100)}))
    load = ledger.load({"old": RequestSize(100, 50), "new": RequestSize(100, 20, 1.0)})
    assert load.jobs == ((2.5, 100), (pytest.approx(2.0), 100)) and load.unshared == 0.3
    ledger.process_ended()
    assert ledger.load({"old": RequestSize(100, 50, 1.0)}).jobs == ((pytest.approx(5.0), 100),)


@pytest.mark.skipif("OMP_NUM_THREADS" in os.environ, reason="the operator's number of threads stays")
def test_engines_beside_each_other_share_the_processors() -> None:
    seen = []
    for place in (ALONE, (1, 2)):
        launch = launch_engine({"model": "demo"}, place=place)
        environment = Path(f"/proc/{launch.process.pid}/environ").read_bytes().split(b"\0")
        seen.append([entry for entry in environment if entry.startswith(b"OMP_NUM_THREADS=")])
        launch.discard()
    assert seen == [[], [f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // 2)}".encode()]]


def test_an_engine_that_has_measured_nothing_takes_what_another_has() -> None:
    ledger, costs = Ledger(), cost.no_costs()
    costs.computed[100] = 0.1
    ledger.assume(costs)
    ledger.note(StatsReport(EngineStats(running=1), cost.no_costs(), {"one": (50.0, 100)}))  # by a guess of its own
    assert ledger.load({"one": RequestSize(100, 50, 1.0)}).jobs == ((pytest.approx(5.0), 100),)
    own = cost.no_costs()
    own.computed[100] = 0.2
    ledger.note(StatsReport(EngineStats(), own, {"one": (9.0, 100)}))
    ledger.assume(costs)
    assert ledger.load({"one": RequestSize(100, 50, 1.0)}).jobs == ((9.0, 100),)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(None, ["cuda:0", "cuda:1", "cuda:0"]), ("cuda", ["cuda:0", "cuda:1", "cuda:0"]), ("cuda:1", ["cuda:1"] * 3)],
)
def test_engines_take_the_devices_in_turn(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, wanted: list[str]
) -> None:
    assert [device_in_turn(asked, turn) for turn in range(3)] == [asked] * 3 or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_in_turn(asked, turn) for turn in range(3)] == wanted
    assert device_in_turn("cpu", 1) == "cpu"


@pytest.mark.parametrize(("before", "seen"), [(None, ["0,1", "2,3"]), ("4,GPU-a,7,5,6", ["4,GPU-a", "7,5"])])
def test_engines_of_several_ranks_see_their_own_devices_alone(
    monkeypatch: pytest.MonkeyPatch, before: str | None, seen: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "what it was is put back after the test")
    for turn, wanted in enumerate(seen):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if before is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        see_in_turn("cpu", turn, 2, 2)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
        see_in_turn(None, turn, 2, 2)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted
    with pytest.raises(InvalidValueError, match="times 2 ranks needs 6 devices, and there are 5"):
        see_in_turn("cuda", 0, 3, 2)
