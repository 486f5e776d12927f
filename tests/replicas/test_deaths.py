"""An engine of a pool that dies loses nothing: what it had is asked again, at most twice, and counted once."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from closeness import levels_apart
from paths import DEMO
from pools import LONG, all_ready, asked, demo_pool, first_of, held, idle, kill
from process_client import ARGS, last, until

from vllm_omni import Omni
from vllm_omni.engine.wire import Sleep, UpdateWeights, Wake
from vllm_omni.errors import DeadlineExceededError, EngineAsleepError, EngineDeadError, RequestAbortedError

POISON = """
import os, signal, sys
if "vllm_omni.engine.process" in sys.orig_argv:
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
    add = DiffusionEngine.add_request
    def add_request(engine, request, *rest, **more):
        if "poison" in str(request.prompt):
            os.kill(os.getpid(), signal.SIGKILL)
        return add(engine, request, *rest, **more)
    DiffusionEngine.add_request = add_request
"""


@pytest.mark.slow
async def test_what_a_dying_engine_had_is_answered_by_another_with_the_same_seed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seeds that nobody gave are drawn once."""
    async with demo_pool() as pool:
        with caplog.at_level(logging.INFO, "vllm_omni"):
            tasks = await asked(pool, 8, "kept", seed=None, num_inference_steps=60, cache="off")
            lost = held(pool)[0]
            assert lost >= 3
            await until(lambda: pool.replicas[0].engine.ledger.costs.computed)
            kill(pool, 0)
            outputs = await asyncio.gather(*tasks)
        assert all(output.ok for output in outputs) and len({output.seed for output in outputs}) == 8
        assert sum("is asked again (1 of 2)" in record.getMessage() for record in caplog.records) == lost
        assert f"replica 0's process ended by SIGKILL; {lost} requests end" in caplog.text
        await all_ready(pool)
        stats = await idle(pool)
        assert stats.requests == {"finished": 8} and stats.restarts == 1
        assert [one.lost for one in stats.replicas] == [lost, 0]
        assert [one.restarts for one in stats.replicas] == [1, 0]
        began = time.monotonic()
        while not pool.replicas[0].answered:  # it is weighed again
            assert time.monotonic() - began < 60, "it is asked no more"
            again = await asyncio.gather(*(last(pool, f"then-{i}", num_inference_steps=20) for i in range(4)))
            assert all(output.ok for output in again)
    with Omni(**ARGS) as omni:
        for output in outputs[:3]:
            wanted = {"seed": output.seed, "num_inference_steps": 60, "cache": "off"}
            (alone,) = omni.generate("red apple", wanted, use_tqdm=False)
            assert levels_apart(output.images[0], alone.images[0]) <= 1


@pytest.mark.slow
async def test_requests_wait_if_all_engines_die_and_new_ones_are_told_when_to_return() -> None:
    async with demo_pool() as pool:
        tasks = await asked(pool, 4, "wait", **LONG)
        late = asyncio.create_task(last(pool, "late", **LONG, timeout_s=4.0))
        ended = asyncio.create_task(last(pool, "ended", **LONG))
        await until(lambda: sum(held(pool)) == 6)
        for replica in pool.replicas:  # back no sooner than what follows has happened
            replica.engine._restarts.pause = lambda now, served: 8.0
        kill(pool, 0, 1)
        await until(lambda: not pool.ready and not sum(held(pool)))
        with pytest.raises(EngineDeadError, match="being restarted") as refused:
            await last(pool, "new")
        assert refused.value.retry_after_s is not None and refused.value.retry_after_s >= 1
        with pytest.raises(EngineDeadError):
            await pool.check_health()
        await pool.abort("ended")
        assert isinstance((await ended).error, RequestAbortedError)
        assert isinstance((await late).error, DeadlineExceededError)
        assert not pool.ready  # neither had to wait for an engine
        assert all(output.ok for output in await asyncio.gather(*tasks))
        assert (await idle(pool)).requests == {"finished": 4, "aborted": 1, "expired": 1}


@pytest.mark.slow
async def test_nothing_is_asked_again_after_a_picture_of_it_went_out_and_steps_are_not_reported_twice() -> None:
    async with demo_pool() as pool:
        seen = await first_of(pool, "seen", preview_every=5, **LONG)
        steps = []

        async def watched() -> bool:
            async for output in pool.generate("penguin", seen_params, "watched"):
                steps.append(output.step)
            return output.ok

        from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

        seen_params = Params(seed=1, **LONG)
        watching = asyncio.create_task(watched())
        async for output in seen:
            if output.images:
                break
        await until(lambda: len(steps) > 3)
        kill(pool, 0, 1)
        outputs = [output async for output in seen]
        assert outputs[-1].finished and isinstance(outputs[-1].error, EngineDeadError)
        assert outputs[-1].error.retry_after_s is not None
        assert await watching and steps == sorted(steps)


@pytest.mark.slow
async def test_a_request_that_kills_engines_kills_three_and_the_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with demo_pool(3) as pool:
        others = await asked(pool, 3, "other", **LONG)
        with pytest.raises(AssertionError):  # `last` wants reports before the end; there is none
            assert (await last(pool, "poisonous", "poison", num_inference_steps=2)).ok
        assert all(output.ok for output in await asyncio.gather(*others))
        await all_ready(pool)
        stats = await idle(pool)
        assert stats.restarts == 3 and stats.requests == {"finished": 3, "failed": 1}


@pytest.mark.slow
async def test_an_engine_that_will_not_start_any_more_leaves_the_others_to_serve() -> None:
    async with demo_pool(max_restarts=0) as pool:
        kill(pool, 1)
        await until(lambda: pool.replicas[1].engine.state == "dead")
        assert pool.ready and (await last(pool, "one", num_inference_steps=2)).ok
        await pool.check_health()
        assert [one.state for one in (await pool.stats()).replicas] == ["ready", "dead"]
        (task,) = await asked(pool, 1, "last", **LONG)
        kill(pool, 0)
        assert isinstance((await task).error, EngineDeadError)
        with pytest.raises(EngineDeadError, match="died more than 0 times"):
            await last(pool, "nobody")


@pytest.mark.slow
async def test_an_engine_that_starts_while_the_others_do_something_does_it_too() -> None:
    """The action lasts until it has started, or it dies while the first one does it."""
    async with demo_pool() as pool:
        first = pool.replicas[0].engine
        do, kills = first.control, [True, False]

        async def slowly(action: Any) -> Any:
            if kills.pop(0):
                kill(pool, 1)
            after = await do(action)
            await until(lambda: pool.replicas[1].engine.state == "ready", 120)
            return after

        kill(pool, 1)
        await until(lambda: pool.replicas[1].engine.state != "ready")
        kills[0] = False
        first.control = slowly  # type: ignore[method-assign]
        await pool.control(UpdateWeights(str(DEMO), ["transformer"]))
        await all_ready(pool)
        assert [one.engine.condition.weights for one in pool.replicas] == [{"transformer": str(DEMO)}] * 2
        kills[:] = [True]
        await pool.control(UpdateWeights(str(DEMO), ["vae"]))
        await all_ready(pool)
        assert pool.replicas[1].engine.condition.weights == pool.replicas[0].engine.condition.weights


@pytest.mark.slow
async def test_those_that_wait_are_answered_before_the_engines_sleep() -> None:
    async with demo_pool() as pool:
        tasks = await asked(pool, 14, "s", num_inference_steps=60, cache="off")
        await pool.control(Sleep())
        assert all(output.ok for output in await asyncio.gather(*tasks))
        with pytest.raises(EngineAsleepError):
            await last(pool, "late")
        await pool.control(Wake())
        assert (await last(pool, "after", num_inference_steps=2)).ok
