"""`/v1/videos`: jobs that make a video, as the official client speaks of them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from PIL import Image
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai import media
from vllm_omni.entrypoints.openai.generation import GenerationRequest, check_makes, match_pictures, plan_video
from vllm_omni.entrypoints.openai.jobs import Jobs, VideoJobs
from vllm_omni.entrypoints.openai.protocol import replies
from vllm_omni.entrypoints.openai.protocol.bodies import body_schema, check_request, media_type, read_json
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.protocol.forms import read_form
from vllm_omni.entrypoints.openai.protocol.requests import INPUT_REFERENCE, VideoRequest
from vllm_omni.entrypoints.openai.protocol.streams import unless_gone
from vllm_omni.entrypoints.openai.state import AppState, State, salt_of
from vllm_omni.entrypoints.openai.store import FILES, VideoJob, VideoStore, usable
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.outputs.media import encode_video

POLL_AFTER_MS = 500
_PICTURES = (INPUT_REFERENCE, "image_reference")
_BODY = body_schema(VideoRequest, "multipart/form-data", optional=(INPUT_REFERENCE,))
_MEDIA = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}


def open_jobs(jobs: Jobs, config: ServeConfig) -> VideoJobs | None:
    """None for a model that makes no video. What would fail every job is raised here: no MP4 encoder, no folder."""
    if not jobs.engine.info.video_output:
        return None
    encode_video([Image.new("RGB", (16, 16))] * 2, "mp4", 8)
    return VideoJobs(jobs, VideoStore(config.store_dir), config)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.omni
    if state.videos is None:
        yield
        return
    async with state.videos:
        yield


router = APIRouter(prefix="/v1/videos", tags=["videos"], lifespan=_lifespan)


@router.post("", openapi_extra=_BODY)
async def create(http: Request, response: Response, state: State) -> replies.VideoReply:
    """Queue a video, from a form or a JSON object; 503 if the queue is full."""
    jobs, generation = _jobs(state), await _read(http, state)
    job = await jobs.create(generation, dict(http.state.facts))
    state.accept(http, generation, video_id=job.id)
    reply = _reply(job, jobs, response)
    reply.omni["warnings"] = http.state.warnings
    return reply


@router.post("/sync", openapi_extra=_BODY, response_class=Response, responses={200: {"content": {_MEDIA["video"]: {}}}})
async def create_and_wait(http: Request, state: State) -> Response:
    """The MP4 itself; nothing is kept, and a client that goes away ends the work."""
    generation = await _read(http, state)
    if generation.timeout_s is None:
        generation = replace(generation, timeout_s=state.config.limits.request_timeout_s)
    state.accept(http, generation)
    with state.timed():
        return await unless_gone(http.receive, _film(http, state, generation))


async def _film(http: Request, state: AppState, generation: GenerationRequest[VideoRequest]) -> Response:
    began = time.monotonic()
    async with aclosing(state.jobs.run(generation, http.state.request_id, http.state.facts)) as items:
        output = [output async for _, output in items][-1]
    frames, fps = output.videos[0], output.fps or state.info.fps
    with usable():
        sound = next(iter(output.audio), None)
        data = await asyncio.to_thread(encode_video, frames, "mp4", fps, sound, output.audio_rate)
    seconds = {name: round(value, 4) for name, value in output.stage_durations.items()}
    omni = {"seed": output.seed, "num_frames": len(frames), "fps": fps, "warnings": http.state.warnings}
    headers = {
        "x-model": generation.model.encode("ascii", "replace").decode(),
        "x-inference-time-s": f"{time.monotonic() - began:.3f}",
        "x-stage-durations": json.dumps(seconds),
        "x-peak-memory-mb": f"{output.peak_memory_mb:.1f}",
        "x-omni": json.dumps(omni),
    }
    return Response(data, media_type=_MEDIA["video"], headers=headers)


async def _read(http: Request, state: AppState) -> GenerationRequest[VideoRequest]:
    check_makes(state.info, "video")
    if media_type(http) == "application/json":
        body = await read_json(http, state.config.limits, _PICTURES)
    else:
        body = await read_form(http, state.config.limits, 1, _PICTURES)
    request = check_request(VideoRequest, body, state.config, state.adapters, state.server_adapters)
    sources = match_pictures(body, state.info, INPUT_REFERENCE)
    pictures = await unless_gone(http.receive, media.load(sources, state.config, state.jobs.decoder))
    planned = await asyncio.to_thread(plan_video, request, state.info, state.config.limits, pictures)
    return replace(planned, salt=salt_of(http, request))


@router.get("")
async def page(
    state: State,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> replies.VideoPage:
    """Jobs in the order of their creation; `after` is the last id of the page before, also if it is deleted by now."""
    jobs = _jobs(state)
    number = None if after is None else jobs.store.number(after)
    if after is not None and number is None:
        raise invalid("after", "after must be the id of a video of this server")
    found = jobs.store.page(number, limit + 1, newest_first=order == "desc")
    data = [_reply(job, jobs) for job in found[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return replies.VideoPage(data=data, first_id=first, last_id=last, has_more=len(found) > limit)


@router.get("/{video_id}")
async def retrieve(video_id: str, response: Response, state: State) -> replies.VideoReply:
    """Where a job stands. A job that failed is a 200 too: its `error` says why."""
    jobs = _jobs(state)
    return _reply(_found(video_id, jobs), jobs, response)


@router.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={200: {"content": {kind: {} for kind in _MEDIA.values()}}},
)
async def content(
    video_id: str, state: State, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """The MP4, the frame in its middle as WebP, or a JPEG of up to 25 frames."""
    jobs = _jobs(state)
    job = _found(video_id, jobs)
    if job.status != "completed":
        raise ApiError(404, f"the video is {job.status.replace('_', ' ')}: it has no content", "video_not_ready")
    name = f"{job.id}.{FILES[variant].rpartition('.')[2]}"
    try:
        return _Opened(jobs.store.file(job, variant), _MEDIA[variant], name)
    except OSError:
        raise ApiError(404, "the video's file is gone", "video_gone", "video_id") from None


@router.delete("/{video_id}")
async def delete(video_id: str, state: State) -> replies.Deleted:
    """End a job within one step, and forget it and its files."""
    jobs = _jobs(state)
    jobs.delete(_found(video_id, jobs).id)
    return replies.Deleted(id=video_id, object="video.deleted")


class _Opened(FileResponse):
    """A file that is sent whole, also if it is deleted meanwhile: it is opened now."""

    def __init__(self, path: Path, media_type: str, name: str) -> None:
        if not path.is_file():
            raise FileNotFoundError(path)
        self._descriptor = os.open(path, os.O_RDONLY)
        super().__init__(f"/dev/fd/{self._descriptor}", media_type=media_type, filename=name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


def _jobs(state: AppState) -> VideoJobs:
    check_makes(state.info, "video")
    assert state.videos is not None
    return state.videos


def _found(video_id: str, jobs: VideoJobs) -> VideoJob:
    if (job := jobs.store.get(video_id)) is None:
        text = "no such video; videos are forgotten a day after they were made"
        raise ApiError(404, text, "not_found", "video_id")
    return job


def _reply(job: VideoJob, jobs: VideoJobs, response: Response | None = None) -> replies.VideoReply:
    if response is not None and job.status in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    record = job.model_dump(exclude={"fields", "facts"})
    return replies.VideoReply(**record, progress=jobs.progress(job), omni={"seed": job.fields.get("seed"), **job.facts})
