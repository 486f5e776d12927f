"""`/v1/images/*`: generations, edits, and the end of a running job."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.openai import picture, reply
from vllm_omni.entrypoints.openai.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.fields import ImageFields, check_fields, parse_json
from vllm_omni.entrypoints.openai.forms import Form, read_form
from vllm_omni.entrypoints.openai.jobs import unless_gone
from vllm_omni.entrypoints.openai.order import Order, check_makes, check_model, make_order
from vllm_omni.entrypoints.openai.schemas import Deleted, ImagesReply, replies
from vllm_omni.entrypoints.openai.sse import EventStream
from vllm_omni.entrypoints.openai.state import Served, served

router = APIRouter(prefix="/v1/images", tags=["images"])


def _body(media: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def _form_schema() -> dict[str, Any]:
    schema = ImageFields.model_json_schema()
    binary = {"type": "string", "format": "binary"}
    schema["properties"] = {"image": binary, "mask": binary, **schema["properties"]}
    schema["required"] = ["image", "prompt"]
    return schema


@router.post(
    "/generations",
    openapi_extra=_body("application/json", ImageFields.model_json_schema()),
    responses=replies(ImagesReply, streams=True),
)
async def generations(request: Request) -> Response:
    """Pictures of a prompt: an ImagesResponse, or with `stream` its events."""
    here = served(request)
    check_makes(here.info, "image")
    _only_json(request)
    given = parse_json(await request.body())
    fields = check_fields(
        given,
        strict=True,
        allow_unknown=here.config.allow_unknown_fields,
        max_prompt=here.config.limits.max_prompt_characters,
    )
    check_model(fields.model, here.config)
    if here.info.image_input:
        raise invalid("image", "this model repaints a picture: use /v1/images/edits", "unsupported_parameter")
    return await answer(here, request, make_order(fields, here.info, here.config), "image_generation")


@router.post(
    "/edits",
    openapi_extra=_body("multipart/form-data", _form_schema()),
    responses=replies(ImagesReply, streams=True),
)
async def edits(request: Request) -> Response:
    """Pictures of a prompt and of pictures given."""
    here = served(request)
    check_makes(here.info, "image")
    form = await read_form(request, here.config.limits.max_input_images)
    fields = check_fields(
        form.fields,
        strict=False,
        allow_unknown=here.config.allow_unknown_fields,
        max_prompt=here.config.limits.max_prompt_characters,
    )
    check_model(fields.model, here.config)
    if not here.info.image_input:
        raise invalid("image", "this model takes no picture; it has /v1/images/generations", "unsupported_parameter")
    pictures = await asyncio.to_thread(_pictures, form, here)
    return await answer(here, request, make_order(fields, here.info, here.config, pictures), "image_edit")


@router.post("/variations")
async def variations() -> Response:
    """Retired by OpenAI, and never here."""
    raise ApiError(410, "variations are no more; use /v1/images/edits", "gone")


@router.delete("/jobs/{job_id}", responses=replies(Deleted))
async def cancel(job_id: str, request: Request) -> Response:
    """End a running request within one step; its own reply says that it was cancelled."""
    if not await served(request).jobs.cancel(job_id):
        raise ApiError(404, "no such job runs; its id is the X-Request-Id of its reply", "not_found", "job_id")
    return JSONResponse({"id": job_id, "object": "image.job", "deleted": True})


async def answer(here: Served, request: Request, order: Order, kind: str) -> Response:
    """The reply or the stream of an order; the engine drops it when the client goes away."""
    job_id, metadata = request.state.request_id, here.config.png_metadata
    here.note(request, order)
    if order.fields.stream:
        events = reply.events(here.jobs, order, job_id, metadata, kind)
        return EventStream(events, here.config.sse_keep_alive_interval_s)
    with here.timed():
        made = await unless_gone(request.receive, reply.collect(here.jobs, order, job_id, metadata))
    return JSONResponse(made)


def _only_json(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "the body must be application/json", "invalid_request")


def _pictures(form: Form, here: Served) -> tuple[Any, ...]:
    limit = here.config.limits.max_input_pixels
    if form.masks:
        raise invalid("mask", "this model takes no mask", "unsupported_parameter")
    found = [picture.decode(data, "image", limit) for data in form.pictures]
    found += [picture.decode_url(url, "url", here.config) for url in form.urls]
    if not found:
        raise invalid("image", "at least one picture is needed")
    return tuple(found)
