"""Between two events: an engine that dies once it is chosen, is back while it is asked why not, or has just gone."""

from __future__ import annotations

import asyncio

import pytest
from paper_engine import SECONDS, answer, pool_of
from paper_engine import PaperEngine as Engine
from process_client import last, until

from vllm_omni.errors import EngineDeadError, QueueFullError
from vllm_omni.replicas.routing import MOST_AGAIN


async def test_an_engine_that_dies_once_it_is_chosen_costs_no_request_and_none_of_its_tries() -> None:
    engine = Engine(dies=MOST_AGAIN + 2)
    pool = pool_of(engine)
    task = answer(pool)
    while engine.dies:
        await until(lambda: engine.state == "starting" and len(pool._line) == 1)
        engine.state = "ready"
        pool.changed("0")
        await asyncio.sleep(0)
    await until(lambda: task.done() or engine.state == "starting")
    if not task.done():
        engine.state = "ready"
        pool.changed("0")
    assert (await task).ok
    stats = await pool.stats()
    assert stats.requests == {"finished": 1} and stats.replicas[0].lost == 0 and stats.replicas[0].answered == 1


async def test_one_that_dies_once_it_is_chosen_leaves_the_request_to_the_other() -> None:
    engines = [Engine(dies=1), Engine(dies=1)]
    pool = pool_of(*engines)
    task = answer(pool)
    await until(lambda: task.done() or not any(engine.dies for engine in engines))
    assert [engine.state for engine in engines] == ["starting", "starting"] and not task.done()
    engines[1].state = "ready"
    pool.changed("1")
    assert (await task).ok and [replica.answered for replica in pool.replicas] == [0, 1]


async def test_engines_that_are_back_while_they_are_asked_why_not_have_no_excuse() -> None:
    engines = [Engine("starting"), Engine("starting")]
    pool = pool_of(*engines)

    async def slow_check() -> None:
        for engine in engines:
            engine.state = "ready"

    engines[0].check_health = slow_check  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError, match="just come back") as refused:
        await last(pool, "r")  # type: ignore[arg-type]
    assert refused.value.retry_after_s == 1.0


async def test_what_waits_is_planned_also_while_no_engine_is_there() -> None:
    """Else nothing would be started just when everything waits."""
    engine = Engine(jobs=2)
    pool = pool_of(engine)
    task = answer(pool)
    await until(lambda: len(pool._line) == 1)
    assert pool.waiting_s == SECONDS
    engine.state = "starting"
    assert pool.waiting_s == SECONDS and (await pool.stats()).queued_cost_s == SECONDS
    await pool.leave("0")
    assert pool.waiting_s == SECONDS
    task.cancel()
    await asyncio.wait([task])
    assert pool.waiting_s == 0.0


async def test_those_refused_by_a_full_pool_are_told_to_return_one_after_another() -> None:
    """By what is left in the line and at all engines: two of them free a place in half the time."""
    pool = pool_of(Engine(jobs=2), Engine(jobs=2))
    waiting = [answer(pool, f"r-{i}") for i in range(10)]
    await until(lambda: len(pool._line) == 10)
    told = []
    for _ in range(20):
        with pytest.raises(QueueFullError) as refused:
            await last(pool, "more")  # type: ignore[arg-type]
        told.append(refused.value.retry_after_s)
    assert told == [pytest.approx(min(i + 1, 14) * SECONDS / 2, abs=0.5) for i in range(20)]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert pool._line._promised == 0.0


async def test_the_time_in_the_line_is_counted_as_replies_have_it() -> None:
    engine = Engine(jobs=2)
    pool = pool_of(engine)
    task = answer(pool)
    await until(lambda: len(pool._line) == 1)
    engine.jobs = 0
    pool.freed()
    output, stats = await task, await pool.stats()
    assert 0.0 < stats.queue_wait_s <= output.stage_durations["queue_s"]


async def test_nobody_is_told_to_return_with_a_request_that_has_ended_three_engines() -> None:
    """Else a video job would ask for it again, and end three more."""
    engines = [Engine(), Engine(), Engine(), Engine()]
    for engine in engines:
        engine.error = EngineDeadError("the engine process ended by SIGSEGV", retry_after_s=5.0)
    output = await answer(pool_of(*engines))
    assert isinstance(output.error, EngineDeadError) and output.error.retry_after_s is None
    assert "3 engines" in str(output.error) and sum(engine.asked for engine in engines) == MOST_AGAIN + 1
