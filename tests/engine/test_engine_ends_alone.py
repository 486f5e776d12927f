"""A process that ends while nobody has asked it for anything: a trial may have been why."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_omni.engine import client as client_of
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.interface import EngineCondition, ModelInfo
from vllm_omni.engine.wire import Loaded, StatsReport

INFO = ModelInfo("m", "P", {}, {}, (), 8, 1.0, {"profiles": ["first"]}, False, {})


class _Engine:
    """A process that loads, reports, and ends."""

    def __init__(self) -> None:
        report = StatsReport(client_of.EngineStats(profiles=("first", "learnt")), client_of.Ledger().costs, {})
        self.events: list[Any] = [Loaded(INFO, EngineCondition()), report, None]
        self.process = SimpleNamespace(pid=0)

    async def receive(self) -> Any:
        return self.events.pop(0)

    def hangs(self, *_: float) -> None:
        return None

    async def end(self, kill: bool) -> str:
        return "ended"


@pytest.mark.asyncio
async def test_a_process_that_ends_with_nobody_there_is_followed_by_one_without_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[bool] = []

    def launch(start: Any) -> Any:
        started.append(start.trials)
        return SimpleNamespace(start=start, began=0.0)

    async def adopt(launch: Any) -> _Engine:
        return _Engine()

    monkeypatch.setattr(client_of.Launch, "of", launch)
    monkeypatch.setattr(client_of.EngineProcess, "adopt", adopt)
    client = ProcessEngineClient({"model": "demo"}, max_restarts=1)
    await client.start()
    async with asyncio.timeout(30):
        while not client._dead:
            await asyncio.sleep(0.01)
    assert started == [True, False]
    assert client.info.cache["profiles"] == ["first", "learnt"]  # what a request may name by now
    await client.shutdown()
