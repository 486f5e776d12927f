"""Between two events: an engine that dies once it is chosen, is back while it is asked why not, or has just gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from process_client import last, until

from vllm_omni.engine.interface import EngineCondition, EngineLoad, EngineStats
from vllm_omni.engine.ledger import Ledger
from vllm_omni.errors import EngineDeadError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas.pool import ReplicaPool
from vllm_omni.replicas.routing import MOST_AGAIN

SECONDS = 2.0  # of every request


class Engine:
    """A `ReplicaEngine` without a model. `dies`: how often it does, between being chosen and being asked."""

    def __init__(self, state: str = "ready", dies: int = 0, jobs: int = 0) -> None:
        self.state, self.dies, self.jobs = state, dies, jobs
        self.condition, self.ledger = EngineCondition(), Ledger()

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(((SECONDS, 4096),) * self.jobs)

    def planned(self, params: OmniDiffusionSamplingParams) -> tuple[float, int]:
        return SECONDS, 4096

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[OmniRequestOutput]:
        if self.dies:
            self.dies, self.state = self.dies - 1, "starting"
            raise EngineDeadError("the engine process is being restarted", retry_after_s=5.0)
        yield OmniRequestOutput(request_id, prompt)

    async def check_health(self) -> None:
        if not self.ready:
            raise EngineDeadError("the engine process is being restarted", retry_after_s=5.0)

    async def stats(self) -> EngineStats:
        return EngineStats()

    async def shutdown(self) -> None:
        self.state = "dead"


def pool_of(*engines: Engine) -> ReplicaPool:
    return ReplicaPool(engines, 1, 8)  # type: ignore[arg-type]


def answer(pool: ReplicaPool) -> asyncio.Task[OmniRequestOutput]:
    return asyncio.create_task(last(pool, "r"))  # type: ignore[arg-type]


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
