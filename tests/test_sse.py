"""A stream of events ends when its client goes away, at whatever moment that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vllm_omni.entrypoints.openai.protocol.streams import Event, EventStream


@pytest.mark.parametrize("turns", range(8))
async def test_a_client_that_leaves_while_an_event_comes(turns: int) -> None:
    """The disconnect is told `turns` turns of the loop after the event was made, so that in one of them both meet."""
    go, left = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncIterator[Event]:
        yield "first", {}
        await go.wait()
        yield "second", {}
        await asyncio.Event().wait()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    serving = asyncio.create_task(EventStream(events(), keep_alive_s=0.05)({"type": "http"}, receive, send))
    await asyncio.sleep(0.02)
    go.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    left.set()
    done, _ = await asyncio.wait({serving}, timeout=2)
    if not done:
        serving.cancel()
    assert done, "it goes on for ever"
