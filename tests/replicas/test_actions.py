"""What an operator does to a pool while requests wait in its line, engines start, and others join."""

from __future__ import annotations

import asyncio

import pytest
from paper_engine import PaperEngine as Engine
from paper_engine import answer, pool_of
from process_client import last, until

from vllm_omni.engine.wire import LoadAdapter, Sleep, UnloadAdapter
from vllm_omni.errors import ConflictError, EngineAsleepError, InvalidValueError, UnknownAdapterError


async def test_an_unload_waits_for_requests_of_the_line_and_new_ones_are_refused() -> None:
    engines = [Engine(jobs=2, ink="/ink"), Engine(jobs=2, ink="/ink")]
    pool = pool_of(*engines)
    waiting = [answer(pool, f"r-{i}", lora_request="ink") for i in range(3)]
    await until(lambda: len(pool._line) == 3)
    unload = asyncio.create_task(pool.control(UnloadAdapter("ink")))
    await until(lambda: "ink" not in pool.condition.adapters)
    with pytest.raises(UnknownAdapterError, match="must be loaded"):
        await last(pool, "late", lora_request="ink")  # type: ignore[arg-type]
    with pytest.raises(ConflictError, match="being unloaded"):
        await pool.control(LoadAdapter("ink", "/other"))
    assert not unload.done() and not any(engine.done for engine in engines)
    engines[0].jobs = 0
    pool.freed()
    assert all([(await task).ok for task in waiting])
    assert not (await unload).adapters and not any(engine.condition.adapters for engine in engines)
    await pool.control(LoadAdapter("ink", "/other"))
    assert pool.condition.adapters == {"ink": "/other"}


async def test_an_unload_that_nobody_waits_for_any_more_leaves_the_adapter() -> None:
    engine = Engine(jobs=2, ink="/ink")
    pool = pool_of(engine)
    task = answer(pool, lora_request="ink")
    await until(lambda: len(pool._line) == 1)
    unload = asyncio.create_task(pool.control(UnloadAdapter("ink")))
    await until(lambda: "ink" not in pool.condition.adapters)
    unload.cancel()
    await asyncio.wait([unload])
    assert "ink" in pool.condition.adapters
    engine.jobs = 0
    pool.freed()
    assert (await task).ok


async def test_a_load_tells_which_adapters_requests_of_the_line_name() -> None:
    engine = Engine(jobs=2, ink="/ink", clay="/clay")
    pool = pool_of(engine)
    task = answer(pool, lora_request="ink")
    await until(lambda: len(pool._line) == 1)
    await pool.control(LoadAdapter("wax", "/wax"))
    engine.jobs = 0
    pool.freed()
    await task
    await pool.control(LoadAdapter("chalk", "/chalk"))
    assert [action.keep for action in engine.done if isinstance(action, LoadAdapter)] == [["ink"], []]


async def test_a_pool_that_is_about_to_sleep_is_not_ready_whatever_else_is_done_meanwhile() -> None:
    engine = Engine(jobs=2)
    pool = pool_of(engine)
    task = answer(pool)
    await until(lambda: len(pool._line) == 1)
    sleep = asyncio.create_task(pool.control(Sleep()))
    await until(lambda: not pool.ready)
    await pool.control(LoadAdapter("ink", "/ink"))
    assert not pool.ready
    with pytest.raises(EngineAsleepError):
        await last(pool, "late")  # type: ignore[arg-type]
    engine.jobs = 0
    pool.freed()
    assert (await task).ok and (await sleep).asleep == 1


async def test_one_that_joins_loses_what_was_unloaded_everywhere() -> None:
    pool = pool_of(Engine(ink="/ink"))
    joined = Engine(style="/style")
    pool.join("new", joined)  # type: ignore[arg-type]
    await until(lambda: pool.ready and all(one.able({}) for one in pool.replicas))
    assert joined.condition.adapters == pool.condition.adapters == {"ink": "/ink"}


async def test_the_first_that_joins_keeps_its_adapters() -> None:
    pool = pool_of()
    pool.join("new", Engine(style="/style"))  # type: ignore[arg-type]
    assert pool.ready and pool.condition.adapters == {"style": "/style"}


async def test_one_that_joins_a_sleeping_pool_sleeps_though_another_one_starts() -> None:
    sleeper = Engine()
    pool = pool_of(sleeper, Engine("starting"))
    await pool.control(Sleep())
    joined = Engine()
    pool.join("new", joined)  # type: ignore[arg-type]
    await until(lambda: joined.state == "asleep")
    assert pool.condition.asleep == 1


async def test_a_refused_action_takes_no_other_one_along() -> None:
    """It is like one that a replica is just catching up with."""
    first, late = Engine(), Engine("starting")
    pool = pool_of(first, late)
    for name in ("a", "b"):
        await pool.control(LoadAdapter(name, f"/{name}"))
    late.may_do.clear()
    late.state = "ready"
    pool.changed("1")
    await until(lambda: pool.replicas[1].catches_up)
    with pytest.raises(InvalidValueError, match="must be new"):
        await pool.control(LoadAdapter("a", "/a"))
    late.may_do.set()
    await until(lambda: not pool.replicas[1].missed)
    assert late.condition.adapters == first.condition.adapters == {"a": "/a", "b": "/b"}


async def test_an_action_may_be_refused_while_a_replica_that_has_started_does_it() -> None:
    first, late = Engine(a="/a"), Engine("starting")
    pool = pool_of(first, late)
    first.may_do.clear()
    late.may_do.clear()
    refused = asyncio.create_task(pool.control(LoadAdapter("a", "/a")))
    await until(lambda: pool.replicas[1].missed)
    late.state = "ready"
    pool.changed("1")
    await until(lambda: pool.replicas[1].catches_up)
    first.may_do.set()
    with pytest.raises(InvalidValueError):
        await refused
    late.may_do.set()
    await asyncio.gather(*pool._tasks)
    assert not pool.replicas[1].missed and not pool.replicas[1].catches_up
