"""`/v1/images/*`: generations, edits, and the end of a running job."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import zipfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.openai import media
from vllm_omni.entrypoints.openai.generation import GenerationRequest, check_makes, match_pictures, plan_images
from vllm_omni.entrypoints.openai.protocol import replies
from vllm_omni.entrypoints.openai.protocol.bodies import body_schema, check_request, media_type, read_json
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.protocol.forms import read_form
from vllm_omni.entrypoints.openai.protocol.requests import ImageRequest
from vllm_omni.entrypoints.openai.protocol.streams import Event, EventStream, unless_gone
from vllm_omni.entrypoints.openai.state import AppState, State, salt_of
from vllm_omni.outputs import OmniRequestOutput

router = APIRouter(prefix="/v1/images", tags=["images"])
Generation = GenerationRequest[ImageRequest]
PICTURES = ("image", "images", "url", "mask", "mask_image", "control_image")


@router.post(
    "/generations",
    openapi_extra=body_schema(ImageRequest, "application/json"),
    response_model=replies.ImagesReply,
    responses=replies.STREAM_OR_FILE,
)
async def generations(http: Request, state: State) -> Any:
    """Pictures of a prompt: an ImagesReply, or with `stream` its events."""
    check_makes(state.info, "image")
    body = await read_json(http, state.config.limits)
    if (name := next((name for name in PICTURES if body.fields.get(name) is not None), None)) is not None:
        raise invalid(name, f"{name} is for /v1/images/edits: send it there", "unknown_parameter")
    request = check_request(ImageRequest, body, state.config, state.adapters, state.server_adapters)
    match_pictures(body, state.info, "image")
    generation = replace(plan_images(request, state.info, state.config.limits), salt=salt_of(http, request))
    return await respond(http, state, generation, _events(http, state, generation, "image_generation"))


@router.post(
    "/edits",
    openapi_extra=body_schema(
        ImageRequest, "multipart/form-data", required=("image",), optional=("mask", "control_image")
    ),
    response_model=replies.ImagesReply,
    responses=replies.STREAM_OR_FILE,
)
async def edits(http: Request, state: State) -> Any:
    """Pictures of a prompt and of pictures given: files of a form, or URLs in a JSON object."""
    check_makes(state.info, "image")
    limits = state.config.limits
    if media_type(http) == "application/json":
        body = await read_json(http, limits, PICTURES)
    else:
        body = await read_form(http, limits, limits.max_input_images, PICTURES)
    request = check_request(ImageRequest, body, state.config, state.adapters, state.server_adapters)
    if not state.info.pictures:
        raise invalid("image", "this model takes no picture; it has /v1/images/generations", "unsupported_parameter")
    if not body.sources:
        raise invalid("image", "at least one picture is needed")
    sources = match_pictures(body, state.info, "image")
    loading = media.load(sources, state.config, state.jobs.decoder, request.n or 1)
    pictures = await unless_gone(http.receive, loading)
    generation = replace(plan_images(request, state.info, limits, pictures), salt=salt_of(http, request))
    return await respond(http, state, generation, _events(http, state, generation, "image_edit"))


@router.post("/variations")
async def variations() -> Response:
    """Retired by OpenAI, and never here."""
    raise ApiError(410, "variations are no more; use /v1/images/edits", "gone")


@router.delete("/jobs/{job_id}")
async def cancel(job_id: str, state: State) -> replies.Deleted:
    """End a running request within one step; its own reply says that it was cancelled."""
    if state.info.video_output or not await state.jobs.cancel(job_id):
        raise ApiError(404, "no such job runs; its id is the X-Request-Id of its reply", "not_found", "job_id")
    return replies.Deleted(id=job_id, object="image.job")


async def respond(
    http: Request, state: AppState, generation: Generation, events: AsyncGenerator[Event, None]
) -> replies.ImagesReply | Response:
    """The reply to a request, its files, or its stream of events; the engine drops it when the client goes away."""
    state.accept(http, generation)
    if generation.request.stream:
        return EventStream(events, state.config.sse_keep_alive_interval_s)
    with state.timed():
        reply = await unless_gone(http.receive, _collect(http, state, generation))
    return _as_file(reply) if generation.request.response_format == "file" else reply


def _as_file(reply: replies.ImagesReply) -> Response:
    """The picture itself, or a ZIP of several."""
    files = [base64.b64decode(picture.b64_json) for picture in reply.data]
    if len(files) == 1:
        return Response(files[0], media_type=f"image/{reply.output_format}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: pictures are compressed already
        for index, data in enumerate(files):
            archive.writestr(f"{index}.{reply.output_format}", data)
    return Response(buffer.getvalue(), media_type="application/zip")


async def encoded(state: AppState, generation: Generation, index: int, output: OmniRequestOutput) -> str:
    """base64 of the (first) picture of an output; encoding stays off the event loop."""
    kept = _parameters(generation, index, output) if state.config.png_metadata and output.finished else None
    compression = generation.request.output_compression
    return await asyncio.to_thread(media.encode, output.images[0], _format(generation), compression, kept)


def data_url(generation: Generation, b64: str) -> str:
    return f"data:image/{_format(generation)};base64,{b64}"


async def _collect(http: Request, state: AppState, generation: Generation) -> replies.ImagesReply:
    request, job_id = generation.request, http.state.request_id
    made: dict[int, tuple[replies.Picture, replies.PictureFacts, replies.Usage]] = {}
    async with aclosing(state.jobs.run(generation, job_id, http.state.facts)) as items:
        async for index, output in items:
            if output.finished:
                facts, b64 = _facts(generation, index, output), await encoded(state, generation, index, output)
                made[index] = replies.Picture(b64_json=b64, seed=facts.seed), facts, usage_of(state, generation, output)
    results = [made[index] for index in sorted(made)]
    return replies.ImagesReply(
        created=int(time.time()),
        data=[picture for picture, _, _ in results],
        usage=results[-1][2],
        safety_identifier=request.safety_identifier,
        omni=replies.Facts(
            request_id=job_id,
            model=generation.model,
            images=[facts for _, facts, _ in results],
            warnings=http.state.warnings,
        ),
        **_looks(generation),
    )


async def _events(http: Request, state: AppState, generation: Generation, kind: str) -> AsyncGenerator[Event, None]:
    """Partial pictures, progress if it was asked for, and a completed event for each picture.

    `kind`: image_generation or image_edit.
    """
    partials, job_id = [0] * len(generation.params), http.state.request_id
    async with aclosing(state.jobs.run(generation, job_id, http.state.facts)) as items:
        async for index, output in items:
            base = {"created_at": int(time.time()), **_looks(generation)}
            if output.finished:
                base["b64_json"] = await encoded(state, generation, index, output)
                base["usage"] = usage_of(state, generation, output).model_dump(exclude={"output_tokens_details"})
                base["omni"] = {"request_id": job_id, "warnings": http.state.warnings}
                base["omni"] |= _facts(generation, index, output).model_dump()
                yield f"{kind}.completed", {"type": f"{kind}.completed", **base}
                continue
            progress = {
                "request_id": job_id,
                "image_index": index,
                "step": output.step,
                "total_steps": output.num_inference_steps,
                "computed_steps": output.computed_steps,
                "skipped_steps": output.skipped_steps,
            }
            if output.images and partials[index] < (generation.request.partial_images or 0):
                base["b64_json"] = await encoded(state, generation, index, output)
                base |= {"partial_image_index": partials[index], "omni": progress}
                partials[index] += 1
                yield f"{kind}.partial_image", {"type": f"{kind}.partial_image", **base}
            elif generation.request.stream_progress:
                yield f"{kind}.progress", {"type": f"{kind}.progress", "omni": progress}


def _format(generation: Generation) -> str:
    return generation.request.output_format or "png"


def _looks(generation: Generation) -> dict[str, Any]:
    """What every reply and event says about its pictures."""
    quality, kind = generation.request.quality or "auto", _format(generation)
    return {"size": generation.size, "quality": quality, "background": "opaque", "output_format": kind}


def usage_of(state: AppState, generation: Generation, output: OmniRequestOutput) -> replies.Usage:
    """Of the whole request; `output` is any picture of it."""

    def tokens(pixels: int) -> int:
        return round(pixels * state.info.tokens_per_pixel)

    text, given = (
        int(output.metrics["text_tokens"]),
        sum(tokens(one.width * one.height) for found in generation.pictures.values() for one in found),
    )
    made = tokens(generation.width * generation.height) * len(generation.params)
    return replies.Usage(
        input_tokens=text + given,
        input_tokens_details=replies.TokenDetails(text_tokens=text, image_tokens=given),
        output_tokens=made,
        output_tokens_details=replies.TokenDetails(text_tokens=0, image_tokens=made),
        total_tokens=text + given + made,
    )


def _facts(generation: Generation, index: int, output: OmniRequestOutput) -> replies.PictureFacts:
    seconds = {**output.stage_durations, **output.metrics} if generation.request.include_timings else {}
    timings = {name: round(value, 4) for name, value in seconds.items() if name.endswith("_s")}
    return replies.PictureFacts(
        image_index=index,
        seed=_seed(generation, index, output),
        num_inference_steps=output.num_inference_steps or 0,
        computed_steps=output.computed_steps,
        skipped_steps=output.skipped_steps,
        plan=None if output.plan is None else [int(flag) for flag in output.plan],
        cache="off" if output.cache_settings is None else _without_curves(output.cache_settings),
        timings=timings or None,
    )


def _without_curves(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if v is not None and not (isinstance(v, list | tuple) and len(v) > 64)}


def _seed(generation: Generation, index: int, output: OmniRequestOutput) -> int:
    return output.seed if output.seed is not None else generation.params[index].seed or 0


def _parameters(generation: Generation, index: int, output: OmniRequestOutput) -> dict[str, Any]:
    """What makes the picture again: the fields of a request, as JSON."""
    params = generation.params[index]
    values = {
        "prompt": generation.request.prompt,
        "negative_prompt": params.negative_prompt,
        "model": generation.model,
        "size": generation.size,
        "seed": _seed(generation, index, output),
        "num_inference_steps": output.num_inference_steps or params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "true_cfg_scale": params.true_cfg_scale,
        "strength": params.strength,
        "cache": params.cache,
        "lora": None if not params.lora_request else [{"name": n, "scale": s} for n, s in params.lora_request],
    }
    return {name: value for name, value in values.items() if value is not None}
