"""Two engines behind one front: the same pictures, spread by what is left to do, limits and actions of all together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from adapters import save_adapter
from closeness import levels_apart
from diffusers import DiffusionPipeline
from paths import DEMO
from pools import LONG, all_ready, asked, demo_pool, first_of, held, idle, kill
from process_client import ARGS, last, until

from vllm_omni import Omni
from vllm_omni.engine import cost
from vllm_omni.engine.wire import LoadAdapter, Sleep, StatsReport, StopProfile, UnloadAdapter, UpdateWeights, Wake
from vllm_omni.errors import (
    ConflictError,
    DeadlineExceededError,
    EngineAsleepError,
    EngineDrainingError,
    InvalidValueError,
    ModelLoadError,
    QueueFullError,
    RequestAbortedError,
    UnknownAdapterError,
)
from vllm_omni.replicas.pool import ReplicaPool
from vllm_omni.replicas.replica import ReplicaEngine

one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[ReplicaPool]:
    async with demo_pool(max_queued_requests=6) as running:
        yield running
        processes = [replica.engine._engine.process for replica in running.replicas]
    assert all(process.poll() is not None for process in processes)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    pipeline = DiffusionPipeline.from_pretrained(DEMO)
    for seed, name in enumerate(("ink", "clay")):
        save_adapter(pipeline, root / name, seed)
    return root


@one_loop
async def test_pictures_equal_those_made_alone_and_both_engines_make_some(pool: ReplicaPool) -> None:
    wanted = [{"seed": i, "num_inference_steps": 4 + i, "cache": ("off", "fast")[i % 2]} for i in range(8)]
    before = [replica.answered for replica in pool.replicas]
    made = await asyncio.gather(*(last(pool, f"same-{i}", **params) for i, params in enumerate(wanted)))
    with Omni(**ARGS) as omni:
        for params, output in zip(wanted, made, strict=True):
            (alone,) = omni.generate("red apple", params, use_tqdm=False)
            assert output.ok and output.plan == alone.plan
            assert levels_apart(output.images[0], alone.images[0]) <= 1
    shares = [replica.answered - count for replica, count in zip(pool.replicas, before, strict=True)]
    assert sum(shares) == 8 and min(shares) >= 3, shares
    assert pool.info.name == "demo" and pool.ready
    await pool.check_health()


@one_loop
async def test_a_request_goes_where_less_is_left_to_do_and_not_where_fewer_are(pool: ReplicaPool) -> None:
    await all_ready(pool)
    (long,) = await asked(pool, 1, "long", num_inference_steps=900, cache="off")
    busy = held(pool).index(1)
    other = pool.replicas[1 - busy]
    shorts = [await first_of(other.engine, f"short-{i}", num_inference_steps=60, cache="off") for i in range(2)]
    await until(lambda: all(seconds < 60 for seconds, _ in other.engine.load.jobs))
    (middle,) = await asked(pool, 1, "middle", num_inference_steps=400, cache="off")
    assert held(pool) == ([1, 3] if busy == 0 else [3, 1])  # two that will soon be done delay it less than a long one
    for stream in shorts:
        await stream.aclose()
    long.cancel()
    middle.cancel()
    await idle(pool)


def rows_left(engine: ReplicaEngine) -> float:
    """Of its first job, by the very costs that its seconds were planned with."""
    (seconds, pixels), *_ = engine.load.jobs
    costs = cost.by_itself(engine.ledger.costs)
    ends = cost.planned_seconds(costs, pixels, 0.0, 0.0)
    return (seconds - ends) / (cost.planned_seconds(costs, pixels, 1.0, 0.0) - ends)


@one_loop
async def test_what_is_left_of_each_job_shrinks_as_its_steps_are_done(
    pool: ReplicaPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aclosing(await first_of(pool, "left", num_inference_steps=900, cache="off")) as stream:
        (engine,) = [replica.engine for replica in pool.replicas if replica.engine.load.jobs]
        note, left, done = engine.ledger.note, list[float](), list[int]()

        def noted(report: StatsReport) -> None:
            note(report)
            left.append(rows_left(engine))
            done.append(report.stats.steps_computed)

        monkeypatch.setattr(engine.ledger, "note", noted)
        while len(left) < 4:
            assert not (await anext(stream)).finished
        monkeypatch.undo()
    assert left[-1] < left[0] < 900 and all(abs(rows - round(rows)) < 1e-6 for rows in left), left
    assert len({round(rows) + steps for rows, steps in zip(left, done, strict=True)}) == 1, (left, done)
    assert 0.0 < engine.load.unshared <= 1.0
    await idle(pool)


@one_loop
async def test_stats_add_up_and_each_request_is_counted_once(pool: ReplicaPool) -> None:
    before = await idle(pool)
    outputs = await asyncio.gather(*(last(pool, f"counted-{i}", num_inference_steps=10, seed=i) for i in range(6)))
    after = await idle(pool)
    assert after.requests["finished"] - before.requests["finished"] == 6
    assert after.steps_computed - before.steps_computed == sum(output.computed_steps for output in outputs)
    assert after.steps_skipped - before.steps_skipped == sum(output.skipped_steps for output in outputs)
    assert after.max_num_seqs == 8 and after.denoisers and len(after.replicas) == 2
    assert [one.name for one in after.replicas] == ["0", "1"] and {one.state for one in after.replicas} == {"ready"}
    answered = [sum(one.answered for one in stats.replicas) for stats in (before, after)]
    assert answered[1] - answered[0] == 6
    with pytest.raises(InvalidValueError, match="height"):
        await last(pool, "bad", height=63)


@one_loop
async def test_requests_beyond_the_places_of_all_are_refused_at_once(pool: ReplicaPool) -> None:
    running = await asked(pool, 10, "full", num_inference_steps=900, cache="off")
    waiting = await asked(pool, 4, "line", num_inference_steps=20)
    for i in range(20):
        with pytest.raises(QueueFullError) as full:
            await last(pool, f"more-{i}")
        assert full.value.retry_after_s >= 1.0
    with pytest.raises(InvalidValueError, match="must not be in use"):
        await last(pool, "full-0")
    assert not any(task.done() for task in (*running, *waiting)) and held(pool) == [5, 5]
    stats = await pool.stats()
    assert stats.waiting >= 4 and stats.queued_cost_s > 0
    for task in running:
        task.cancel()
    assert all(output.ok for output in await asyncio.gather(*waiting))
    await idle(pool)


@one_loop
async def test_those_that_wait_go_in_their_order_wherever_there_is_a_place_first(pool: ReplicaPool) -> None:
    long = await asked(pool, 10, "long", num_inference_steps=900, cache="off")
    late = asyncio.create_task(last(pool, "late", num_inference_steps=4, priority=5))
    gone = asyncio.create_task(last(pool, "gone", num_inference_steps=4))
    early = asyncio.create_task(last(pool, "early", num_inference_steps=4, priority=-5))
    await until(lambda: len(pool._line) == 3)
    assert [request.request_id for request in pool._line] == ["early", "gone", "late"]
    before = (await pool.stats()).aborts_by_stage.get("queued", 0)
    await pool.abort("gone")
    assert isinstance((await gone).error, RequestAbortedError)
    expired = await last(pool, "expired", num_inference_steps=4, timeout_s=0.01)
    assert isinstance(expired.error, DeadlineExceededError)
    assert [request.request_id for request in pool._line] == ["early", "late"]
    assert (await pool.stats()).aborts_by_stage["queued"] == before + 1
    place = next(replica for replica in pool.replicas if "long-3" in replica.engine._requests.ids)
    await pool.abort("long-3")
    assert isinstance((await long[3]).error, RequestAbortedError)
    await until(lambda: len(pool._line) < 2)
    assert [request.request_id for request in pool._line] == ["late"] and "early" in place.engine._requests.ids
    for task in long:
        task.cancel()
    assert all(output.ok for output in await asyncio.gather(early, late))
    await idle(pool)


@one_loop
async def test_abort_leaving_and_deadlines_reach_the_engine_that_has_the_request(pool: ReplicaPool) -> None:
    before = (await idle(pool)).requests
    tasks = await asked(pool, 4, "gone", num_inference_steps=900, cache="off")
    await pool.abort(["gone-0", "gone-1", "unknown"])
    tasks[2].cancel()
    late = await last(pool, "late", num_inference_steps=900, cache="off", timeout_s=0.5)
    assert isinstance(late.error, DeadlineExceededError)
    for task in tasks[:2]:
        assert isinstance((await task).error, RequestAbortedError)
    tasks[3].cancel()
    after = (await idle(pool)).requests
    assert after["aborted"] - before.get("aborted", 0) == 4 and after["expired"] - before.get("expired", 0) == 1


@one_loop
async def test_what_an_operator_does_is_done_to_all(pool: ReplicaPool, adapters: Path) -> None:
    condition = await pool.control(LoadAdapter("ink", str(adapters / "ink")))
    assert list(condition.adapters) == ["ink"]
    assert all("ink" in replica.engine.condition.adapters for replica in pool.replicas)
    for refused in (LoadAdapter("ink", str(adapters / "ink")), UnloadAdapter("never")):
        with pytest.raises(InvalidValueError):
            await pool.control(refused)
    with pytest.raises(ModelLoadError):
        await pool.control(LoadAdapter("none", str(adapters)))
    with pytest.raises(ConflictError):
        await pool.control(StopProfile())
    assert not (await pool.control(UnloadAdapter("ink"))).adapters
    assert (await pool.control(Sleep())).asleep == 1 and not pool.ready
    with pytest.raises(EngineAsleepError):
        await last(pool, "sleepy")
    assert {one.state for one in (await pool.stats()).replicas} == {"asleep"}
    assert (await pool.control(Wake())).asleep == 0 and pool.ready
    before = await last(pool, "before", num_inference_steps=3)
    assert {*(await pool.control(UpdateWeights(str(DEMO)))).weights.values()} == {str(DEMO)}
    after = await last(pool, "after", num_inference_steps=3)
    assert levels_apart(before.images[0], after.images[0]) <= 1


@one_loop
async def test_an_adapter_of_one_engine_draws_its_requests_there(pool: ReplicaPool, adapters: Path) -> None:
    """As when each engine has pushed out another one to make room."""
    for replica, name in zip(pool.replicas, ("ink", "clay"), strict=True):
        await replica.engine.control(LoadAdapter(name, str(adapters / name)))
    assert sorted(pool.condition.adapters) == ["clay", "ink"]
    for name, replica in (("ink", pool.replicas[0]), ("clay", pool.replicas[1])):
        before = replica.answered
        for i in range(3):
            assert (await last(pool, f"{name}-{i}", num_inference_steps=2, lora_request=name)).ok
        assert replica.answered == before + 3
    with pytest.raises(UnknownAdapterError, match="by one replica"):
        await last(pool, "both", lora_request=["ink", "clay"])
    await pool.replicas[0].engine.control(Sleep())
    assert pool.ready and (await last(pool, "awake", num_inference_steps=2)).ok
    await pool.replicas[0].engine.control(Wake())


@one_loop
@pytest.mark.slow
async def test_an_engine_that_was_away_does_what_was_done_meanwhile_before_it_is_asked(
    pool: ReplicaPool, adapters: Path
) -> None:
    kill(pool, 1)
    await until(lambda: pool.replicas[1].engine.state == "starting")
    await pool.control(LoadAdapter("late", str(adapters / "ink")))
    assert pool.replicas[1].missed and pool.ready
    await all_ready(pool)
    assert all("late" in replica.engine.condition.adapters for replica in pool.replicas)
    await pool.control(UnloadAdapter("late"))


@pytest.mark.slow
@one_loop
async def test_draining_ends_what_was_taken_though_an_engine_dies_meanwhile(pool: ReplicaPool) -> None:
    """The last test of the shared pool: nothing is taken any more."""
    await all_ready(pool)
    tasks = await asked(pool, 4, "drained", **LONG)
    drain = asyncio.create_task(pool.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await last(pool, "refused")
    kill(pool, 0)
    began = time.monotonic()
    await drain
    assert all(task.done() and task.result().ok for task in tasks) and not pool.ready
    assert time.monotonic() - began < 60
