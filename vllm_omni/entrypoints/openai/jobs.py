"""What runs in the engine: generations that end with their client, and video jobs that outlive it, and the server.

All of it belongs to one event loop; encoding and files are written in threads.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

from PIL import Image

from vllm_omni.engine.interface import EngineClient
from vllm_omni.entrypoints.openai import media
from vllm_omni.entrypoints.openai.decoding import Decoder
from vllm_omni.entrypoints.openai.generation import GenerationRequest, match_pictures, plan_video
from vllm_omni.entrypoints.openai.protocol.bodies import Body, check_request
from vllm_omni.entrypoints.openai.protocol.errors import as_api_error, unavailable
from vllm_omni.entrypoints.openai.protocol.requests import INPUT_REFERENCE, VideoRequest
from vllm_omni.entrypoints.openai.store import FILES, VideoJob, VideoStore, usable
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.errors import (
    DeadlineExceededError,
    EngineAsleepError,
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    InvalidValueError,
    QueueFullError,
    RequestAbortedError,
    StoreError,
)
from vllm_omni.logger import init_logger, told
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.media import contact_sheet, encode_video

logger = init_logger(__name__)

MAX_PENALTY = 6  # levels of priority: how far a key with many requests steps back behind others
REFUSAL_S = 0.5  # what goes wrong within this time is a status of the POST; later, it is the job's error
LEAVING_S = 1.0  # within this time, an id whose client has left is free
MAX_DEATHS = 3  # of engine processes while a job ran: then it is taken for the cause
SWEEP_EVERY_S = 60.0
_STOPPING = (EngineDrainingError, EngineClosedError, RequestAbortedError)  # the next server continues the job
Item = tuple[int, OmniRequestOutput]
Generation = GenerationRequest[VideoRequest]
Admission = asyncio.Future[None]


@dataclass
class Jobs:
    """What runs, by the id that the client was given: one engine request per picture, ended together."""

    engine: EngineClient
    decoder: Decoder
    share: int | None = None  # requests to the engine that one key may have at a time, where keys are several
    running: dict[str, asyncio.Queue[Item | BaseException]] = field(default_factory=dict)
    held: Counter[int] = field(default_factory=Counter)  # by key

    async def cancel(self, job_id: str) -> bool:
        """End a job within one step; False for an id that does not run.

        The job itself is told, not the engine: a job may be so young that the engine has not heard of it.
        """
        if (inbox := self.running.get(job_id)) is None:
            return False
        inbox.put_nowait(RequestAbortedError(f"request {job_id} was cancelled"))
        return True

    async def _await_id(self, job_id: str) -> None:
        """Return once nobody has it: a client that retries may come before its last connection is known to be gone."""
        for _ in range(20):
            if job_id not in self.running:
                return
            await asyncio.sleep(LEAVING_S / 20)
        raise InvalidValueError("X-Request-Id", job_id, "must not be in use")

    def _held(self, key: int | None, count: int) -> int:
        """How many requests of a key run or wait; ApiError if `count` more, unless it is 0, are beyond its share."""
        held = 0 if key is None else self.held[key]
        if held and count and self.share and held + count > self.share:
            text = f"this key has {held} pictures in work or waiting, and a share of {self.share}"
            raise unavailable(text, "queue_full", None)
        return held

    async def run(
        self, generation: GenerationRequest[Any], job_id: str, facts: dict[str, Any] | None = None, again: bool = False
    ) -> AsyncGenerator[Item, None]:
        """(index of the picture, progress or the finished output), as they come; raises the first failure.

        Leaving the iterator, or a failure of one picture, ends them all. Steps are added up in `facts`.
        Of several keys, each has its share of the places, and its requests go after those of keys that have fewer.
        `again`: it was admitted before, and is not refused for its key's share.
        """
        count, key = len(generation.params), (facts or {}).get("key")
        await self._await_id(job_id)
        held = self._held(key, 0 if again else count)
        inbox: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self.running[job_id] = inbox

        async def one(index: int) -> None:
            stream = self.engine.generate(
                generation.prompt,
                generation.params[index],
                f"{job_id}-{index}",
                priority=(generation.request.priority or 0) + min(held, MAX_PENALTY),
                timeout_s=generation.timeout_s,
                salt=generation.salt,
            )
            async with aclosing(stream) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    inbox.put_nowait((index, output))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                inbox.put_nowait(error)

        if key is not None:
            self.held[key] += count
        tasks = [asyncio.create_task(one(i)) for i in range(count)]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            left = len(tasks)
            while left:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                output = item[1]
                if output.finished and facts is not None:
                    facts["computed_steps"] = facts.get("computed_steps", 0) + output.computed_steps
                    facts["skipped_steps"] = facts.get("skipped_steps", 0) + output.skipped_steps
                if output.error is not None:
                    raise output.error
                left -= output.finished
                yield item
        finally:
            if key is not None:
                self.held[key] -= count
            del self.running[job_id]  # before anything waits: a client may leave in this very turn
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class VideoJobs:
    """`async with` it: unfinished jobs of the store restart, and stay in the store when the block ends."""

    def __init__(self, jobs: Jobs, store: VideoStore, config: ServeConfig) -> None:
        self._jobs, self.store, self._config = jobs, store, config
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, int] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for job in self.store.unfinished():
            self._begin(job, None, {}).set_result(None)
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

    async def create(self, generation: Generation, facts: dict[str, Any]) -> VideoJob:
        """A job that the engine has admitted; raises, and leaves nothing, if it is refused within REFUSAL_S."""
        asked, params = generation.request, generation.params[0]
        length = (params.num_frames or 1) / (params.fps or 1)
        fields = asked.model_dump(exclude_none=True, exclude={"width", "height"})
        given = [found[0] for found in generation.pictures.values()]
        picture = next((one for one in given if isinstance(one, Image.Image)), None)
        job = self.store.add(
            model=generation.model,
            prompt=asked.prompt,
            seconds=f"{length:.3f}".rstrip("0").rstrip(".") if asked.seconds is None else str(asked.seconds),
            size=generation.size,
            fields=fields | {"model": generation.model, "size": generation.size, "seed": params.seed},
            picture=await asyncio.to_thread(media.to_bytes, picture, "PNG") if picture else None,
        )
        admission, admitted = self._begin(job, generation, facts), False
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSAL_S):
                    await admission
            admitted = True
        finally:
            if not admitted:  # refused, or the client has gone away
                self.delete(job.id)
        return self.store.get(job.id) or job

    def delete(self, job_id: str) -> None:
        """End it within one step, and forget it."""
        self.store.remove(job_id)
        if (task := self._tasks.get(job_id)) is not None:
            task.cancel()  # leaving the engine's iterator aborts the request

    def _begin(self, job: VideoJob, generation: Generation | None, facts: dict[str, Any]) -> Admission:
        admission: Admission = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run(job, generation, admission, facts))
        self._tasks[job.id] = task
        task.add_done_callback(lambda task: self._ended(job, admission, task))
        return admission

    async def _run(
        self, job: VideoJob, generation: Generation | None, admission: Admission, facts: dict[str, Any]
    ) -> None:
        if generation is None:
            generation = await self._restored(job)
        ends = time.monotonic() + (math.inf if generation.timeout_s is None else generation.timeout_s)
        deaths = 0
        while True:
            try:
                output = await self._generate(job, _in_time(generation, ends), admission, facts)
                break
            except (QueueFullError, EngineDeadError, EngineAsleepError) as error:
                deaths += isinstance(error, EngineDeadError) and self._progress.pop(job.id, None) is not None
                if not admission.done() or error.retry_after_s is None or deaths >= MAX_DEATHS:
                    raise
                pause = error.retry_after_s
            await asyncio.sleep(min(pause, ends - time.monotonic()))
        frames, fps = output.videos[0], output.fps or self._jobs.engine.info.fps
        encoding = asyncio.create_task(asyncio.to_thread(self._write, job, output, frames, fps))
        try:
            await asyncio.shield(encoding)
        except asyncio.CancelledError:
            await encoding  # a thread cannot be cancelled; its files go once it has written them
            raise
        made = {
            "num_frames": len(frames),
            "fps": fps,
            "num_inference_steps": output.num_inference_steps,
            "computed_steps": output.computed_steps,
            "skipped_steps": output.skipped_steps,
        }
        self.store.ended(job.id, None, made)

    async def _restored(self, job: VideoJob) -> Generation:
        """A stored job as this server makes it, in what is left of its time; raises if it does not."""
        data, config = await asyncio.to_thread(self.store.picture, job), self._config
        body = Body(job.fields, sources=[] if data is None else [(INPUT_REFERENCE, data)])
        info, adapters = self._jobs.engine.info, self._jobs.engine.condition.adapters
        request = check_request(VideoRequest, body, config, adapters)
        pictures = await media.load(match_pictures(body, info, INPUT_REFERENCE), config, self._jobs.decoder)
        planned = await asyncio.to_thread(plan_video, request, info, config.limits, pictures)
        left = None if planned.timeout_s is None else planned.timeout_s - (time.time() - job.created_at)
        return replace(planned, timeout_s=left, salt=job.id)

    async def _generate(
        self, job: VideoJob, generation: Generation, admission: Admission, facts: dict[str, Any]
    ) -> OmniRequestOutput:
        async with aclosing(self._jobs.run(generation, job.id, facts, again=admission.done())) as items:
            async for _, output in items:
                if job.id not in self._progress:
                    self.store.begun(job.id)
                if not admission.done():
                    admission.set_result(None)
                self._progress[job.id] = min(99, 100 * output.step // (output.num_inference_steps or 100))
                if output.finished:
                    return output
        raise RequestAbortedError(f"request {job.id} ended without an output")

    def _write(self, job: VideoJob, output: OmniRequestOutput, frames: list[Image.Image], fps: float) -> None:
        """In a thread."""
        with usable():  # an MP4 is made in a file
            data = {
                "video": encode_video(frames, "mp4", fps, next(iter(output.audio), None), output.audio_rate),
                "thumbnail": media.to_bytes(frames[len(frames) // 2], "WEBP", quality=90),
                "spritesheet": media.to_bytes(contact_sheet(frames), "JPEG", quality=85),
            }
        self.store.write(job, {FILES[name]: content for name, content in data.items()})

    def _ended(self, job: VideoJob, admission: Admission, task: asyncio.Task[None]) -> None:
        """The one place where a job leaves, however it ended."""
        self._tasks.pop(job.id, None)
        self._progress.pop(job.id, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not admission.done():
            admission.set_exception(error)
        elif self._deleted(job.id):
            self.store.clear(job.id)
        elif error is not None and not isinstance(error, _STOPPING):
            detail = as_api_error(error).detail
            texts = (job.prompt, *(value for value in job.fields.values() if isinstance(value, str)))
            private = () if self._config.log_prompts else texts
            trace = "" if isinstance(error, StoreError) else "\n" + told(error, private)  # a full disk is one line
            logger.error("video %s failed: %s%s", job.id, error if not trace else type(error).__name__, trace)
            self.store.ended(job.id, detail.model_dump(), {})

    def _deleted(self, job_id: str) -> bool:
        """Meanwhile, by a client."""
        try:
            return self.store.get(job_id) is None
        except StoreError:
            return False

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                self.store.sweep()
            except (StoreError, OSError, sqlite3.Error) as error:  # a full disk, say: another time
                logger.error("the store of videos was not tidied: %s", error)


def _in_time(generation: Generation, ends: float) -> Generation:
    """The same, with the time that is left until `ends`; DeadlineExceededError if none is."""
    if (left := ends - time.monotonic()) <= 0:
        raise DeadlineExceededError("the video was not made within its timeout_s")
    return replace(generation, timeout_s=left if left < math.inf else None)
