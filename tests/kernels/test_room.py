"""How many requests a device has room and time for: arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker.coroutine import ComponentCall
from vllm_omni.diffusion.worker.memory import work_of
from vllm_omni.diffusion.worker.request import ParkedCall, Request
from vllm_omni.kernels.room import KEPT_SIZES, LEAST_KEPT, MARGIN, PATIENCE, TRIES, Limits, Room, Work

SMALL, LARGE = Work("compute", "small", 1000), Work("compute", "large", 4000)
DECODE = Work(("component", "vae"), "key")


@dataclass
class Residuals:
    used: int = 0
    budget: int | None = None


def test_a_device_without_a_limit_limits_nothing() -> None:
    room, residuals = Room(None, 16), Residuals()
    room.govern(residuals)
    assert not room.unknown(SMALL, 1) and room.at_once(SMALL) is None
    assert room.budget is None and residuals.budget is None and room.told() == ""


def test_before_anything_ran_half_is_for_residuals() -> None:
    room = Room(1000, 16)
    assert room.budget == 500 and room.at_once(SMALL) is None and room.unknown(SMALL, 1)


def test_what_two_batches_took_says_what_each_further_request_takes() -> None:
    room = Room(1000, 16)
    room.took(SMALL, 1, 150, blocks=True)
    assert room.at_once(SMALL) == int(1000 / (150 * MARGIN))
    assert room.unknown(SMALL, 2) and not room.unknown(SMALL, 1)
    room.took(SMALL, 3, 250, blocks=True)
    assert room.at_once(SMALL) == int(900 / (50 * MARGIN))
    assert not room.unknown(SMALL, 2) and room.unknown(SMALL, 4)
    room.took(SMALL, 4, 250, blocks=True)
    assert room.at_once(SMALL) == int((1000 - 350 / 3) / (100 / 3 * MARGIN))


def test_residuals_get_what_a_whole_batch_leaves_but_half_at_least() -> None:
    room, residuals = Room(1000, 4), Residuals()
    room.govern(residuals)
    room.took(SMALL, 1, 20, blocks=True)
    assert residuals.budget == 1000 - 4 * 20
    room.took(LARGE, 1, 80, blocks=True)
    assert residuals.budget == 1000 - 4 * 80
    room.took(DECODE, 1, 400)
    assert residuals.budget == 600  # a decode must fit, too
    room.took(LARGE, 2, 400, blocks=True)
    assert residuals.budget == 500
    room.took(Work("compute", "huge", 9000), 1, 700, blocks=True)
    assert residuals.budget == 300  # alone it must run
    room.keep_less(100)
    room.keep_less(200)
    assert room.budget == residuals.budget == 100


def test_a_budget_that_was_asked_for_stands() -> None:
    room, residuals = Room(1000, 4), Residuals(budget=900)
    room.govern(residuals)
    room.took(LARGE, 1, 80, blocks=True)
    assert residuals.budget == 900
    room.keep_less(300)
    assert residuals.budget == 300
    on_cpu, residuals = Room(None, 4), Residuals(budget=7)
    on_cpu.govern(residuals)
    assert residuals.budget == 7


def test_what_residuals_hold_is_not_free() -> None:
    room, residuals = Room(1000, 16), Residuals(used=450)
    room.took(SMALL, 1, 50, blocks=True)
    free = room.at_once(SMALL)
    room.govern(residuals)
    assert free == int(1000 / (50 * MARGIN)) and room.at_once(SMALL) == int(550 / (50 * MARGIN))
    residuals.used = 2000
    assert room.at_once(SMALL) == 1


def test_a_size_that_never_ran_is_judged_by_the_largest_that_did() -> None:
    room = Room(1000, 16)
    room.took(SMALL, 1, 50, blocks=True)
    assert room.at_once(LARGE) == int(1000 / (200 * MARGIN))
    assert room.at_once(DECODE) is None and room.at_once(Work("skip", "large", 4000)) is None
    room.longest_s = 10.0
    room.lasted(SMALL, 2, 0.2)
    assert room.at_once(LARGE) == min(int(10 / (0.1 * 4**2)), int(1000 / (200 * MARGIN)))
    room.lasted(LARGE, 1, 5.0)
    assert room.at_once(LARGE) == 2 and room.at_once(SMALL) == int(1000 / (50 * MARGIN))
    room.lasted(LARGE, 1, 50.0)
    assert room.at_once(LARGE) == 2  # the quickest counts: a first run loads and compiles
    room.lasted(Work("compute", "long", 40_000), 1, 50.0)
    assert room.at_once(Work("compute", "long", 40_000)) == 1


def test_it_says_what_it_found() -> None:
    room, residuals = Room(2**30, 16), Residuals()
    room.govern(residuals)
    room.took(SMALL, 1, 2**28, blocks=True)
    room.took(SMALL, 2, 3 * 2**27, blocks=True)
    told = room.told()
    assert "1024 MiB are free" in told and "takes 128.0 MiB and 128.0 MiB per request" in told
    assert "6 of 16 at once" in told and "residuals may take 512 MiB" in told


def test_clients_cannot_fill_it() -> None:
    room = Room(1000, 16)
    for size in range(2000):
        room.took(Work("compute", size, 10), 1, 10, blocks=True)
    assert len(room._sizes) <= 256 and room.at_once(Work("compute", 1999, 10)) == pytest.approx(90, abs=1)


def test_the_size_that_was_used_least_recently_is_forgotten() -> None:
    room = Room(1000, 16)
    room.took(DECODE, 1, 300)
    for size in range(2 * KEPT_SIZES):
        room.took(Work("compute", size, 10), 1, 10)
        assert not room.unknown(DECODE, 1)
    assert room.unknown(Work("compute", 0, 10), 1) and not room.unknown(Work("compute", 2 * KEPT_SIZES - 1, 10), 1)


def test_a_call_that_nobody_can_share_is_known_by_its_shapes_and_not_by_its_request() -> None:
    nothing: Any = SimpleNamespace()

    def decoded(name: str, side: int) -> Work:
        call = ComponentCall("vae", "decode", (torch.zeros(1, 4, side, side),), {"generator": torch.Generator()})
        parked = ParkedCall(call, (name, ()), StepKind.COMPONENT)
        return work_of(Request(name, nothing, None, None, nothing, parked=parked))

    assert decoded("a", 8) == decoded("b", 8) != decoded("a", 16)
    assert decoded("a", 8).elements == 256 and decoded("a", 8).coding


def turns_until(limits: Limits, more: int) -> int:
    """Turns at a limit before `more` at once are tried."""
    for turn in range(100 * PATIENCE):
        if (most := limits.most(SMALL) or 0) >= more:
            return turn
        if most:
            limits.held(SMALL, most)
        else:
            assert limits.bars(SMALL)
    return -1


def test_a_limit_is_raised_after_a_while_and_later_each_time_that_this_fails() -> None:
    limits = Limits(rise=True)
    assert limits.most(SMALL) is None and not limits.bars(SMALL)
    limits.lower(SMALL, 8)
    limits.lower(SMALL, 4)  # in the same turn
    for _ in range(10 * PATIENCE):
        limits.held(SMALL, 3)  # says nothing of four
    assert turns_until(limits, 8) == PATIENCE
    for failures in range(1, 4):
        limits.lower(SMALL, 4)
        assert turns_until(limits, 8) == PATIENCE * 2**failures
    assert turns_until(limits, 16) == PATIENCE * 2**3  # eight had room at last


def test_what_found_no_room_at_all_is_tried_again() -> None:
    limits = Limits(rise=True)
    limits.lower(SMALL, 0)
    assert turns_until(limits, 1) == PATIENCE and not limits.bars(SMALL)
    limits.lower(SMALL, 0)
    assert turns_until(limits, 1) == 2 * PATIENCE


def test_ranks_that_must_decide_alike_try_nothing_again() -> None:
    limits = Limits(rise=False)
    limits.lower(SMALL, 2)
    limits.lower(LARGE, 0)
    for _ in range(10 * PATIENCE):
        limits.held(SMALL, 2)
        assert limits.bars(LARGE)
    assert limits.most(SMALL) == 2


def test_residuals_may_take_more_again_after_a_while() -> None:
    room, residuals = Room(2**30, 4), Residuals()
    room.govern(residuals)
    free = residuals.budget
    room.keep_less(3)
    assert residuals.budget == 3
    budgets = []
    for _ in range(2 * PATIENCE):  # few residuals say nothing of many
        room.went_well()
    assert residuals.budget == 3
    for _ in range(64 * PATIENCE):
        residuals.used = residuals.budget or 0
        room.went_well()
        budgets.append(residuals.budget)
    assert budgets[PATIENCE - 2] == 3 and budgets[PATIENCE - 1] == LEAST_KEPT and budgets[-1] == free


def test_more_requests_than_pay_do_not_share_a_forward() -> None:
    """Cost of each: lower up to 16, higher at 32. Half are tried before it is known."""
    room = Room(None, 64)
    cost = {16: 1.0, 24: 0.99, 32: 1.2, 64: 1.5}
    seen = []
    for _ in range(60):
        count = room.pays(SMALL, 64)
        seen.append(count)
        room.lasted(SMALL, count, count * cost[count])
    assert seen[0] == 64 and set(seen) == {64, 32, 16} and seen[-20:] == [16] * 20
    assert seen.count(64) == seen.count(32) == TRIES
    assert room.pays(SMALL, 24) == 24 and room.pays(SMALL, 16) == 16 and room.pays(LARGE, 64) == 64


def test_as_many_as_run_share_a_forward_while_that_pays_and_one_slow_turn_decides_nothing() -> None:
    room = Room(None, 64)
    for turn in range(60):
        count = room.pays(SMALL, 32)
        each = 0.9 if count == 32 else 1.0
        room.lasted(SMALL, count, count * each * (7 if turn % 5 == 0 else 1))
    assert room.pays(SMALL, 32) == 32
