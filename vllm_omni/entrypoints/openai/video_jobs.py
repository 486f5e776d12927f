"""Video jobs in the engine: begun when they are created, begun again by the next server, ended by whoever deletes them.

All of it belongs to one event loop; encoding and files are written in threads.
"""

from __future__ import annotations

import asyncio
import io
from contextlib import aclosing, suppress
from typing import Any, Self

from PIL import Image

from vllm_omni.entrypoints.openai import picture
from vllm_omni.entrypoints.openai.errors import as_api_error
from vllm_omni.entrypoints.openai.state import Served
from vllm_omni.entrypoints.openai.video_fields import REFERENCE, VideoFields, VideoOrder, make_video_order
from vllm_omni.entrypoints.openai.video_store import FILES, VideoJob, VideoStore
from vllm_omni.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    QueueFullError,
    RequestAbortedError,
)
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.media import contact_sheet, encode_video

logger = init_logger(__name__)

REFUSAL_S = 0.5  # what goes wrong so soon is told as a status; later, by the job
MAX_DEATHS = 3  # of engine processes while a job ran: then it is taken for the cause
SWEEP_EVERY_S = 60.0
_LEFT = (EngineDrainingError, EngineClosedError, RequestAbortedError)  # the server stops: the next one goes on
Heard = asyncio.Future[None]


class VideoJobs:
    """`async with` it: unfinished jobs of the store begin again, and stay in the store when the block ends."""

    def __init__(self, here: Served, store: VideoStore) -> None:
        self._here, self.store = here, store
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, int] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for job in self.store.unfinished():
            self._begin(job, None, None)
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *exception: object) -> None:
        tasks = [*self._tasks.values(), *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.store.close()

    def progress(self, job: VideoJob) -> int:
        """Percent."""
        return 100 if job.status == "completed" else self._progress.get(job.id, 0)

    async def create(self, order: VideoOrder) -> VideoJob:
        """A job that the engine has taken; raises, and leaves nothing, where it is refused within REFUSAL_S."""
        given = order.fields.model_dump(exclude_none=True, exclude={"width", "height"})
        job = self.store.add(
            model=order.model,
            prompt=order.fields.prompt,
            seconds=order.seconds,
            size=order.size,
            fields=given | {"model": order.model, "size": order.size, "seed": order.params.seed},
            picture=await asyncio.to_thread(_png, order.picture) if order.picture else None,
        )
        heard: Heard = asyncio.get_running_loop().create_future()
        self._begin(job, order, heard)
        taken = False
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSAL_S):
                    await heard
            taken = True
        finally:
            if not taken:  # refused, or the client has gone away
                self.delete(job.id)
        return self.store.get(job.id) or job

    def delete(self, job_id: str) -> bool:
        """End it within one step, and forget it; False for an id that is not there."""
        if self.store.get(job_id) is None:
            return False
        self.store.remove(job_id)
        if (task := self._tasks.get(job_id)) is not None:
            task.cancel()  # leaving the engine's iterator aborts the request
        return True

    def _begin(self, job: VideoJob, order: VideoOrder | None, heard: Heard | None) -> None:
        task = asyncio.create_task(self._run(job, order, heard))
        self._tasks[job.id] = task
        task.add_done_callback(lambda task: self._ended(job, heard, task))

    async def _run(self, job: VideoJob, order: VideoOrder | None, heard: Heard | None) -> None:
        if order is None:
            order = await asyncio.to_thread(self._again, job)
        deaths = 0
        while True:
            try:
                output = await self._generate(job, order, heard)
                break
            except (QueueFullError, EngineDeadError) as error:
                deaths += isinstance(error, EngineDeadError) and self._progress.pop(job.id, None) is not None
                if (heard and not heard.done()) or error.retry_after_s is None or deaths >= MAX_DEATHS:
                    raise
                pause = error.retry_after_s
            await asyncio.sleep(pause)
        frames, fps = output.videos[0], output.fps or self._here.info.fps
        encoding = asyncio.create_task(asyncio.to_thread(self._write, job, frames, fps))
        try:
            await asyncio.shield(encoding)
        except asyncio.CancelledError:
            await encoding  # a thread cannot be cancelled; its files go once it has written them
            raise
        self.store.ended(job.id, None, _facts(output, len(frames), fps))

    def _again(self, job: VideoJob) -> VideoOrder:
        """A stored job as this server makes it; raises where it does not."""
        here, data = self._here, self.store.picture(job)
        image = None if data is None else picture.decode(data, REFERENCE, here.config.limits.max_input_pixels)
        return make_video_order(VideoFields(**job.fields), here.info, here.config, image)

    async def _generate(self, job: VideoJob, order: VideoOrder, heard: Heard | None) -> OmniRequestOutput:
        stream = self._here.engine.generate(
            order.prompt,
            order.params,
            job.id,
            priority=order.fields.priority or 0,
            timeout_s=order.fields.timeout_s,
        )
        async with aclosing(stream) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                if job.id not in self._progress:
                    self.store.begun(job.id)
                if heard is not None and not heard.done():
                    heard.set_result(None)
                self._progress[job.id] = min(99, 100 * output.step // (output.num_inference_steps or 100))
                if output.finished:
                    return output
        raise RequestAbortedError(f"request {job.id} ended without an output")

    def _write(self, job: VideoJob, frames: list[Image.Image], fps: float) -> None:
        """In a thread."""
        thumbnail, sheet = io.BytesIO(), io.BytesIO()
        frames[len(frames) // 2].save(thumbnail, "WEBP", quality=90)
        contact_sheet(frames).save(sheet, "JPEG", quality=85)
        data = {
            "video": encode_video(frames, "mp4", fps),
            "thumbnail": thumbnail.getvalue(),
            "spritesheet": sheet.getvalue(),
        }
        self.store.write(job, {FILES[name]: content for name, content in data.items()})

    def _ended(self, job: VideoJob, heard: Heard | None, task: asyncio.Task[None]) -> None:
        """The one place where a job leaves, however it ended."""
        self._tasks.pop(job.id, None)
        self._progress.pop(job.id, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and heard is not None and not heard.done():
            heard.set_exception(error)
        elif self.store.get(job.id) is None:  # deleted meanwhile
            self.store.clear(job.id)
        elif error is not None and not isinstance(error, _LEFT):
            told = as_api_error(error).body()["error"]
            logger.error("video %s failed: %s", job.id, told["message"], exc_info=error)
            self.store.ended(job.id, told, {})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            self.store.sweep()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _facts(output: OmniRequestOutput, frames: int, fps: float) -> dict[str, Any]:
    return {
        "num_frames": frames,
        "fps": fps,
        "num_inference_steps": output.num_inference_steps,
        "computed_steps": output.computed_steps,
        "skipped_steps": output.skipped_steps,
    }
