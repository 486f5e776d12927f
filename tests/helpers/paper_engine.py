"""Engines without a model: they are as busy as a test says, answer at once, and do actions on their condition alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from process_client import last

from vllm_omni.engine.interface import EngineCondition, EngineLoad, EngineStats
from vllm_omni.engine.ledger import Ledger
from vllm_omni.engine.wire import Action, LoadAdapter, Sleep, UnloadAdapter
from vllm_omni.errors import EngineDeadError, InvalidValueError, UnknownAdapterError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas.pool import ReplicaPool

SECONDS = 2.0  # of every request


class PaperEngine:
    """A `ReplicaEngine`. `dies`: how often it does, between being chosen and being asked."""

    def __init__(self, state: str = "ready", dies: int = 0, jobs: int = 0, **adapters: str) -> None:
        self.state, self.dies, self.jobs = state, dies, jobs
        self.condition, self.ledger = EngineCondition(adapters), Ledger()
        self.error: Exception | None = None  # of every answer
        self.asked = 0
        self.done: list[Action] = []
        self.may_do = asyncio.Event()  # until then, an action takes
        self.may_do.set()

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
        self.asked += 1
        for name, _scale in params.lora_request or ():
            if name not in self.condition.adapters:
                raise UnknownAdapterError("lora_request", name, "must be loaded")
        yield OmniRequestOutput(request_id, prompt, error=self.error)

    async def control(self, action: Action) -> EngineCondition:
        await self.may_do.wait()
        adapters = dict(self.condition.adapters)
        if isinstance(action, LoadAdapter):
            if action.name in adapters:
                raise InvalidValueError("lora_name", action.name, "must be new")
            adapters[action.name] = action.path
        elif isinstance(action, UnloadAdapter):
            del adapters[action.name]
        elif isinstance(action, Sleep):
            self.state = "asleep"
        asleep = action.level if isinstance(action, Sleep) else 0
        self.condition = replace(self.condition, adapters=adapters, asleep=asleep)
        self.done.append(action)
        return self.condition

    async def check_health(self) -> None:
        if not self.ready:
            raise EngineDeadError("the engine process is being restarted", retry_after_s=5.0)

    async def stats(self) -> EngineStats:
        return EngineStats()

    async def shutdown(self) -> None:
        self.state = "dead"


def pool_of(*engines: PaperEngine, seqs: int = 1) -> ReplicaPool:
    return ReplicaPool(engines, seqs, 8)  # type: ignore[arg-type]


def answer(pool: ReplicaPool, name: str = "r", **params: Any) -> asyncio.Task[OmniRequestOutput]:
    return asyncio.create_task(last(pool, name, **params))  # type: ignore[arg-type]
