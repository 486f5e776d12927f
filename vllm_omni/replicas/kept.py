"""A task that goes on for as long as whoever made it wants it to. Knows nothing of what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_omni.logger import init_logger, told

logger = init_logger(__name__)


class KeptTask:
    """Runs `work`; if that ends by an error, logs it and begins again after `pause_s`, until `cancel`."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], pause_s: float, what: str) -> None:
        self._work, self._pause_s, self._what = work, pause_s, what
        self._cancelled = False
        self._task = self._begun(0.0)

    def cancel(self) -> None:
        """End it, without waiting for that."""
        self._cancelled = True
        self._task.cancel()

    async def end(self) -> None:
        """End it, and return once it has ended."""
        self.cancel()
        await asyncio.wait([self._task])

    def _begun(self, after_s: float) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(after_s))
        task.add_done_callback(self._ended)
        return task

    async def _run(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._work()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("%s failed:\n%s", self._what, told(error))
        if not self._cancelled:
            self._task = self._begun(self._pause_s)
