"""Video jobs over an engine that dies: what was accepted goes on, within the time that it has had from the start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_omni.engine.interface import EngineCondition, ModelInfo
from vllm_omni.entrypoints.openai.generation import plan_video
from vllm_omni.entrypoints.openai.jobs import Jobs, VideoJobs
from vllm_omni.entrypoints.openai.protocol.requests import VideoRequest
from vllm_omni.entrypoints.openai.store import VideoJob, VideoStore
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.errors import EngineDeadError
from vllm_omni.outputs import OmniRequestOutput

CONFIG = ServeConfig(engine_args={"model": "demo"})
SHARE = 2


class Engine:
    """Every request runs until `end`; with an error it ends as those of a process that dies."""

    info = ModelInfo("m", "P", {}, {"width": 16, "height": 16}, (), 8, 1.0, {}, False, {}, video_output=True, fps=8)
    condition = EngineCondition()

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []  # of each request, in the order in which they came
        self._end: asyncio.Future[Exception | None] = asyncio.Future()

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, timeout_s: float | None, **more: Any
    ) -> AsyncIterator[OmniRequestOutput]:
        self.timeouts.append(timeout_s)
        yield OmniRequestOutput(request_id, finished=False, num_inference_steps=4)
        error = await asyncio.shield(self._end)
        frames = [] if error else [[Image.new("RGB", (16, 16))] * 2]
        yield OmniRequestOutput(request_id, videos=frames, fps=8, error=error)

    def end(self, error: Exception | None = None) -> None:
        self._end.set_result(error)
        self._end = asyncio.Future()


@pytest.fixture
async def engine() -> Engine:
    return Engine()


def jobs_of(engine: Engine, folder: Path) -> VideoJobs:
    return VideoJobs(Jobs(engine, None, SHARE), VideoStore(folder), CONFIG)  # type: ignore[arg-type]


async def create(videos: VideoJobs, timeout_s: float | None = None) -> VideoJob:
    request = VideoRequest(prompt="x", model="demo", num_frames=2, timeout_s=timeout_s)
    return await videos.create(plan_video(request, Engine.info, CONFIG.limits, {}), {"key": 0})


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_accepted_jobs_outlive_a_death_also_when_their_key_has_its_share_again(
    engine: Engine, tmp_path: Path
) -> None:
    async with jobs_of(engine, tmp_path) as videos:
        first = [await create(videos) for _ in range(SHARE)]
        engine.end(EngineDeadError("it died", retry_after_s=0.3))
        await until(lambda: not videos._jobs.held.total())
        later = [await create(videos) for _ in range(SHARE)]
        await until(lambda: len(engine.timeouts) == 3 * SHARE)
        engine.end()
        for job in first + later:
            await until(lambda job=job: videos.store.get(job.id).status not in ("queued", "in_progress"))
            assert videos.store.get(job.id).status == "completed"
        assert not videos._jobs.held.total()


async def test_a_jobs_time_goes_on_while_its_engine_is_replaced(engine: Engine, tmp_path: Path) -> None:
    async with jobs_of(engine, tmp_path) as videos:
        job = await create(videos, 1.0)
        await asyncio.sleep(0.1)
        engine.end(EngineDeadError("it died", retry_after_s=0.01))
        await until(lambda: len(engine.timeouts) == 2)
        assert 0 < engine.timeouts[1] <= engine.timeouts[0] - 0.1
        engine.end(EngineDeadError("it died", retry_after_s=600))
        await until(lambda: videos.store.get(job.id).status == "failed")
        assert videos.store.get(job.id).error.code == "deadline_exceeded"
        assert len(engine.timeouts) == 2


async def test_a_jobs_time_goes_on_while_the_server_is_away(engine: Engine, tmp_path: Path) -> None:
    store = VideoStore(tmp_path, lambda: time.time() - 100)
    fields = {"prompt": "x", "model": "demo", "num_frames": 2}
    late, early = (
        store.add(
            model="demo", prompt="x", seconds="1", size="", fields=fields | {"timeout_s": timeout_s}, picture=None
        )
        for timeout_s in (50.0, 500.0)
    )
    store.close()
    async with jobs_of(engine, tmp_path) as videos:
        await until(lambda: videos.store.get(late.id).status == "failed" and engine.timeouts)
        assert videos.store.get(late.id).error.code == "deadline_exceeded"
        assert videos.store.get(early.id).status == "in_progress"
        assert len(engine.timeouts) == 1 and 300 < engine.timeouts[0] < 401
