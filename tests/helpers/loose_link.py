"""A link to a replica that is not there: it reports, answers, falls silent and hangs as a test wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from vllm_omni.engine.interface import EngineCondition, EngineStats, ModelInfo
from vllm_omni.engine.wire import (
    HEADER,
    Add,
    Loaded,
    Outputs,
    StateReport,
    StatsReport,
    UnitCosts,
    decode_command,
    encode,
)
from vllm_omni.outputs import OmniRequestOutput

INFO = ModelInfo(
    name="tiny",
    pipeline="FluxPipeline",
    denoisers={},
    defaults={"num_inference_steps": 4, "height": 64, "width": 64},
    parameters=(),
    size_multiple=8,
    tokens_per_pixel=1 / 64,
    cache={},
    previews=False,
    pictures={},
)
COSTS = UnitCosts({64 * 64: 0.1}, {}, {}, 1.0)
FOR_EVER = 3600.0


class LooseLink:
    """A `Link`. It reports `state` until it is `lost`, and its one answer comes when `answered` is set."""

    def __init__(self) -> None:
        self.state, self.lost, self.hangs = "ready", False, False  # `hangs`: calls come in, and never out
        self.answered = asyncio.Event()
        self.watched = 0  # by so many
        self.jobs: dict[str, tuple[float, int]] = {}  # as it reports them
        self.stats = EngineStats()  # likewise
        self.waiting_s: float | None = None  # as it was told

    async def describe(self) -> bytes:
        await self._hung()
        return bytes(encode(Loaded(INFO, EngineCondition())))

    async def watch(self) -> AsyncGenerator[bytes, None]:
        self.watched += 1
        try:
            while True:
                await asyncio.sleep(FOR_EVER if self.lost else 0.01)
                report = StatsReport(self.stats, COSTS, dict(self.jobs))
                yield bytes(encode(StateReport(self.state, EngineCondition(), report)))
        finally:
            self.watched -= 1

    async def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        add = decode_command(frame[HEADER.size :])
        assert isinstance(add, Add)
        await self.answered.wait()
        yield bytes(encode(Outputs([OmniRequestOutput(add.request_id)])))

    async def note_waiting(self, seconds: float) -> None:
        await self._hung()
        self.waiting_s = seconds

    async def control(self, frame: bytes) -> bytes:
        raise NotImplementedError

    async def abort(self, request_ids: list[str]) -> None: ...

    def close(self) -> None: ...

    async def _hung(self) -> None:
        if self.hangs:
            await asyncio.sleep(FOR_EVER)


class LooseHandle:
    """What Ray Serve gives for a deployment, over links by the names of their replicas."""

    def __init__(self, links: dict[str, LooseLink]) -> None:
        self.links = links

    def __getattr__(self, name: str) -> _Method:
        return _Method(self.links, name)


class _Method:
    def __init__(self, links: dict[str, LooseLink], name: str, stream: bool = False) -> None:
        self._links, self._name, self._stream = links, name, stream

    def options(self, stream: bool) -> _Method:
        return _Method(self._links, self._name, stream)

    def remote(self, *args: Any, replica: str | None = None) -> Any:
        link = self._links[replica] if replica is not None else next(iter(self._links.values()))
        call = getattr(link, self._name)(*args)
        return _Stream(call) if self._stream else call


class _Stream:
    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        self._frames = frames

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._frames)

    def cancel(self) -> None: ...
