"""A replica that says nothing any more: what it had is given back, and nothing that still speaks is taken for lost."""

from __future__ import annotations

import asyncio
import logging

import pytest
from loose_link import LooseLink
from process_client import last, until

from vllm_omni.engine.interface import EngineStats
from vllm_omni.errors import EngineDeadError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas import remote
from vllm_omni.replicas.kept import KeptTask
from vllm_omni.replicas.pool import ReplicaPool
from vllm_omni.replicas.remote import RemoteEngine

SILENCE_S = 0.5


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE_S", SILENCE_S)
    monkeypatch.setattr(remote, "WATCH_AGAIN_S", 0.02)


@pytest.fixture
def link() -> LooseLink:
    return LooseLink()


async def asked(engine: RemoteEngine) -> asyncio.Task[list[OmniRequestOutput]]:
    """A request that it has."""

    async def outputs() -> list[OmniRequestOutput]:
        return [output async for output in engine.generate("x", Params(seed=0), "r")]

    task = asyncio.create_task(outputs())
    await until(lambda: engine.load.jobs)
    return task


async def test_what_a_lost_replica_has_counted_stays_and_nothing_runs_there(link: LooseLink) -> None:
    link.stats = EngineStats(running=1, waiting=2, queued_cost_s=9.0, steps_computed=5)
    engine = RemoteEngine(link)
    await engine.start()
    await until(lambda: engine._stats.running)
    link.lost = True
    await until(lambda: engine.state == "starting")
    stats = await engine.stats()
    assert (stats.running, stats.waiting, stats.queued_cost_s, stats.steps_computed) == (0, 0, 0.0, 5)
    await engine.shutdown()


async def test_a_machine_that_vanishes_gives_its_requests_back_and_may_return(link: LooseLink) -> None:
    engine = RemoteEngine(link)
    await engine.start()
    task = await asked(engine)
    await until(lambda: link.watched)
    link.lost = True
    (output,) = await asyncio.wait_for(task, 30)
    assert isinstance(output.error, EngineDeadError) and "nothing was heard" in str(output.error)
    await until(lambda: engine.state == "starting")
    assert not engine.ready
    link.lost = False  # what listened to it has been given up, and another one hears it
    await until(lambda: engine.ready)
    await engine.shutdown()
    assert not link.watched


async def test_what_it_had_is_answered_by_another_replica() -> None:
    pool, links = ReplicaPool([], 4, 8), [LooseLink(), LooseLink()]
    for name, link in zip("ab", links, strict=True):
        engine = RemoteEngine(link, lambda name=name: pool.changed(name))
        await engine.start()
        pool.join(name, engine)
    task = asyncio.create_task(last(pool, "r"))  # type: ignore[arg-type]
    await until(lambda: any(replica.engine.load.jobs for replica in pool.replicas))
    busy = next(i for i, replica in enumerate(pool.replicas) if replica.engine.load.jobs)
    links[1 - busy].answered.set()
    links[busy].lost = True
    assert (await asyncio.wait_for(task, 30)).ok
    assert [replica.lost for replica in pool.replicas] == [int(i == busy) for i in range(2)]
    await pool.shutdown()


async def test_a_slow_request_of_a_replica_that_reports_is_waited_for(link: LooseLink) -> None:
    engine = RemoteEngine(link)
    await engine.start()
    task = await asked(engine)
    await asyncio.sleep(3 * SILENCE_S)
    assert not task.done() and engine.ready
    link.answered.set()
    (output,) = await task
    assert output.ok
    await engine.shutdown()


async def test_one_that_has_left_is_heard_until_it_has_ended_what_it_had(link: LooseLink) -> None:
    engine = RemoteEngine(link)
    await engine.start()
    task = await asked(engine)
    await engine.shutdown()
    await asyncio.sleep(3 * SILENCE_S)
    assert not task.done() and engine.state == "dead" and link.watched
    link.answered.set()
    (output,) = await task
    assert output.ok
    await until(lambda: not link.watched)


async def test_a_fault_of_whoever_is_told_of_changes_loses_no_replica(
    link: LooseLink, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def changed() -> None:
        told.append(engine.state)
        if len(told) == 1:
            raise KeyError("a fault")

    engine = RemoteEngine(link, changed)
    with caplog.at_level(logging.ERROR, "vllm_omni"):
        await engine.start()
        link.state = "asleep"
        await until(lambda: told)
        link.state = "ready"
        await until(lambda: told == ["asleep", "ready"])
        assert engine.ready and "listening to a replica failed" in caplog.text and "a fault" in caplog.text
    await engine.shutdown()
    assert not link.watched


async def test_what_is_kept_begins_again_until_it_is_ended() -> None:
    runs: list[int] = []

    async def work() -> None:
        runs.append(len(runs))
        raise KeyError("a fault")

    task = KeptTask(work, 0.01, "this")
    await until(lambda: len(runs) == 3)
    await task.end()
    await asyncio.sleep(0.1)
    assert len(runs) <= 4 and task._task.done()


async def test_who_waits_for_a_place_is_told_of_one_that_a_report_shows(link: LooseLink) -> None:
    """As when an engine has ended a request that its client had left before."""
    freed: list[int] = []
    engine = RemoteEngine(link, freed=lambda: freed.append(len(engine.load.jobs)))
    link.jobs = {"left": (1.0, 4096)}
    await engine.start()
    await until(lambda: engine.load.jobs)
    assert not freed
    link.jobs = {}
    await until(lambda: freed == [0])
    await engine.shutdown()
