"""`/v1/videos`: jobs that make a video, as the official client speaks of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from PIL import Image
from starlette.responses import FileResponse, JSONResponse, Response

from vllm_omni.entrypoints.openai import picture
from vllm_omni.entrypoints.openai.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.fields import check_fields_of, parse_json
from vllm_omni.entrypoints.openai.forms import Form, read_form
from vllm_omni.entrypoints.openai.order import check_makes, check_model
from vllm_omni.entrypoints.openai.schemas import Deleted, VideoPage, VideoReply, replies
from vllm_omni.entrypoints.openai.state import Served, served
from vllm_omni.entrypoints.openai.video_fields import REFERENCE, VideoFields, check_reference, make_video_order
from vllm_omni.entrypoints.openai.video_jobs import VideoJobs
from vllm_omni.entrypoints.openai.video_store import FILES, VideoJob, VideoStore
from vllm_omni.entrypoints.serve_config import ServeConfig
from vllm_omni.logger import init_logger
from vllm_omni.outputs.media import encode_video

logger = init_logger(__name__)

POLL_AFTER_MS = 500
_MEDIA = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}


def open_jobs(here: Served) -> VideoJobs | None:
    """None for a model that makes no video. What would fail every job is raised here: no MP4 encoder, no folder."""
    if not here.info.video_output:
        return None
    encode_video([Image.new("RGB", (16, 16))] * 2, "mp4", 8)
    return VideoJobs(here, VideoStore(here.config.store_dir))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    jobs: VideoJobs | None = app.state.videos
    if jobs is None:
        yield
        return
    async with jobs:
        yield


router = APIRouter(prefix="/v1/videos", tags=["videos"], lifespan=_lifespan)


def _body() -> dict[str, Any]:
    schema = VideoFields.model_json_schema()
    schema["properties"][REFERENCE] = {"type": "string", "format": "binary"}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("", openapi_extra=_body(), responses=replies(VideoReply))
async def create(request: Request) -> Response:
    """Queue a video, from a multipart form or a JSON object; 503 where the queue is full."""
    here = served(request)
    jobs = _jobs(request)
    as_json = request.headers.get("content-type", "").startswith("application/json")
    form = (
        Form(parse_json(await request.body()), [], [], [])
        if as_json
        else await read_form(request, 1, pictures=(REFERENCE,), urls=())
    )
    reference = form.fields.pop(REFERENCE, None)
    fields = check_fields_of(
        VideoFields,
        form.fields,
        strict=as_json,
        allow_unknown=here.config.allow_unknown_fields,
        max_prompt=here.config.limits.max_prompt_characters,
    )
    check_model(fields.model, here.config)
    check_reference(bool(form.pictures or form.urls or reference is not None), here.info)
    image = await asyncio.to_thread(_picture, form, reference, here.config)
    order = make_video_order(fields, here.info, here.config, image)
    job = await jobs.create(order)
    told = {
        "request_id": request.state.request_id,
        "video_id": job.id,
        "size": job.size,
        "frames": order.params.num_frames,
        "steps": order.params.num_inference_steps,
    }
    logger.info("accepted %s", told, extra=told)
    return _reply(job, jobs)


@router.get("", responses=replies(VideoPage))
async def page(
    request: Request,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """Jobs in the order of their creation; `after` is the last id of the page before."""
    jobs = _jobs(request)
    if after is not None and jobs.store.get(after) is None:
        raise invalid("after", "after must be the id of a video that is still there")
    found = jobs.store.page(after, limit + 1, newest_first=order == "desc")
    data = [_as_json(job, jobs) for job in found[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(found) > limit})


@router.get("/{video_id}", responses=replies(VideoReply))
async def retrieve(video_id: str, request: Request) -> Response:
    """Where a job stands. A job that failed is a 200 too: its `error` says why."""
    jobs = _jobs(request)
    return _reply(_found(video_id, jobs), jobs)


@router.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={200: {"content": {kind: {} for kind in _MEDIA.values()}}},
)
async def content(
    video_id: str, request: Request, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """The MP4, the frame in its middle as WebP, or a JPEG of up to 25 frames."""
    jobs = _jobs(request)
    job = _found(video_id, jobs)
    if job.status != "completed":
        raise ApiError(404, f"the video is {job.status.replace('_', ' ')}: it has no content", "video_not_ready")
    name = f"{job.id}.{FILES[variant].rpartition('.')[2]}"
    return FileResponse(jobs.store.file(job, variant), media_type=_MEDIA[variant], filename=name)


@router.delete("/{video_id}", responses=replies(Deleted))
async def delete(video_id: str, request: Request) -> Response:
    """End a job within one step, and forget it and its files."""
    if not _jobs(request).delete(video_id):
        raise _unknown()
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


def _jobs(request: Request) -> VideoJobs:
    check_makes(served(request).info, "video")
    jobs: VideoJobs = request.app.state.videos
    return jobs


def _found(video_id: str, jobs: VideoJobs) -> VideoJob:
    if (job := jobs.store.get(video_id)) is None:
        raise _unknown()
    return job


def _unknown() -> ApiError:
    return ApiError(404, "no such video; videos are forgotten a day after they were made", "not_found", "video_id")


def _reply(job: VideoJob, jobs: VideoJobs) -> Response:
    waits = job.status in ("queued", "in_progress")
    return JSONResponse(_as_json(job, jobs), headers={"openai-poll-after-ms": str(POLL_AFTER_MS)} if waits else {})


def _as_json(job: VideoJob, jobs: VideoJobs) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": jobs.progress(job),
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "prompt": job.prompt,
        "seconds": job.seconds,
        "size": job.size,
        "remixed_from_video_id": None,
        "error": job.error,
        "omni": {"seed": job.fields["seed"], **job.facts},
    }


def _picture(form: Form, reference: Any, config: ServeConfig) -> Image.Image | None:
    """The picture of a form's file, of a data URL, or of `{"image_url": data URL}`."""
    if form.pictures:
        return picture.decode(form.pictures[0], REFERENCE, config.limits.max_input_pixels)
    url = form.urls[0] if form.urls else reference
    if isinstance(url, dict):
        if set(url) != {"image_url"}:
            raise invalid(REFERENCE, f"{REFERENCE} takes image_url alone; no files are kept", "unsupported_parameter")
        url = url["image_url"]
    return None if url is None else picture.decode_url(url, REFERENCE, config)
