"""Requests to an engine in a process of its own, and what to wait for."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.outputs import OmniRequestOutput

ARGS = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": 4}


async def last(client: ProcessEngineClient, name: str, prompt: Any = "red apple", **given: Any) -> OmniRequestOutput:
    options = {key: given.pop(key) for key in ("priority", "timeout_s") if key in given}
    outputs = [o async for o in client.generate(prompt, Params(**{"seed": 0} | given), name, **options)]
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def until(condition: Any, seconds: float = 30.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def reported(client: ProcessEngineClient) -> None:
    """Once a report has come that was made after this call: any command makes one of an engine that does nothing."""
    ledger = client.ledger
    seen = ledger._stats
    client._send_abort(["nobody"])
    await until(lambda: ledger._stats is not seen and not (ledger._stats.running or ledger._stats.waiting))


async def idle(client: ProcessEngineClient) -> None:
    await until(lambda: not client._requests)
    await reported(client)
    stats = await client.stats()
    assert (stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s) == (0, 0, 0, 0.0)


def page_faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def gone(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    return True
