"""Pools of the demo model, their processes, and what to wait for."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from process_client import ARGS, last, reported, until

from vllm_omni.engine.interface import EngineStats
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas.pool import ReplicaPool, local_pool

LONG = {"num_inference_steps": 150, "cache": "off"}


def demo_pool(size: int = 2, **options: Any) -> ReplicaPool:
    return local_pool(ARGS, size, **{"warmup": False} | options)


def pid_of(pool: ReplicaPool, index: int) -> int:
    return pool.replicas[index].engine._engine.process.pid  # type: ignore[attr-defined]


def kill(pool: ReplicaPool, *indices: int) -> None:
    """As the kernel does it: no goodbye."""
    for index in indices:
        os.kill(pid_of(pool, index), signal.SIGKILL)


async def all_ready(pool: ReplicaPool) -> None:
    await until(lambda: all(replica.able(pool._control.weights) for replica in pool.replicas), 120)


def held(pool: ReplicaPool) -> list[int]:
    """Requests in flight at each."""
    return [len(replica.engine.load.jobs) for replica in pool.replicas]


async def asked(pool: ReplicaPool, count: int, prefix: str, **params: Any) -> list[asyncio.Task[OmniRequestOutput]]:
    """So many requests with seeds of their own, all of them with an engine or in the line."""
    before = sum(held(pool)) + len(pool._line)
    tasks = [asyncio.create_task(last(pool, f"{prefix}-{i}", **{"seed": i} | params)) for i in range(count)]
    await until(lambda: sum(held(pool)) + len(pool._line) == before + count)
    return tasks


async def idle(pool: ReplicaPool) -> EngineStats:
    await until(lambda: not pool._asked and not sum(held(pool)))
    there = [replica.engine for replica in pool.replicas if replica.engine.state in ("ready", "asleep")]
    await asyncio.gather(*(reported(engine) for engine in there))  # type: ignore[arg-type]
    stats = await pool.stats()
    assert (stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s) == (0, 0, 0, 0.0)
    return stats


async def first_of(pool: ReplicaPool, name: str, **params: Any) -> Any:
    """The iterator of a request whose first report has come."""
    stream = pool.generate("red apple", Params(**{"seed": 0} | params), name)
    await anext(stream)  # type: ignore[call-overload]
    return stream
