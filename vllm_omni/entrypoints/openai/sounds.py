"""`/v1/audio/generate`: sound of a text, for models that make sound alone (Stable Audio, ACE-Step)."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.openai.generation import GenerationRequest, check_makes, plan_sound
from vllm_omni.entrypoints.openai.protocol.bodies import Body, body_schema, check_request, read_json
from vllm_omni.entrypoints.openai.protocol.errors import invalid
from vllm_omni.entrypoints.openai.protocol.requests import SoundRequest
from vllm_omni.entrypoints.openai.protocol.streams import unless_gone
from vllm_omni.entrypoints.openai.state import AppState, State, salt_of
from vllm_omni.entrypoints.openai.store import usable
from vllm_omni.outputs.sound import encode_sound

router = APIRouter(prefix="/v1/audio", tags=["audio"])
_MEDIA = {"wav": "audio/wav", "flac": "audio/flac"}
_ALSO = {"input": "prompt", "audio_length": "seconds"}  # as the field names them for this route
_ALWAYS = {"audio_start": 0.0, "speed": 1.0}  # what clients of other servers send of them; nothing else is done


@router.post(
    "/generate",
    openapi_extra=body_schema(SoundRequest, "application/json"),
    response_class=Response,
    responses={200: {"content": {media: {} for media in _MEDIA.values()}}},
)
async def generate(http: Request, state: State) -> Response:
    """The sound itself, as a file; a client that goes away ends the work."""
    check_makes(state.info, "sound")
    body = await read_json(http, state.config.limits)
    _rename(body)
    request = check_request(SoundRequest, body, state.config, state.adapters, state.server_adapters)
    planned = plan_sound(request, state.info, state.config.limits)
    generation = replace(planned, salt=salt_of(http, request))
    state.accept(http, generation)
    with state.timed():
        return await unless_gone(http.receive, _sound(http, state, generation))


def _rename(body: Body) -> None:
    """Fields by our names, which errors turn back; without those that ask for nothing."""
    for name, usual in _ALWAYS.items():
        if body.fields.pop(name, None) not in (None, usual):
            raise invalid(name, f"{name} can only be {usual:g} here", "unsupported_parameter")
    for theirs, ours in _ALSO.items():
        if theirs in body.fields:
            if body.fields.get(ours, body.fields[theirs]) != body.fields[theirs]:
                raise invalid(theirs, f"{theirs} and {ours} mean the same and differ; give one")
            body.fields[ours] = body.fields.pop(theirs)
            body.names[ours] = theirs


async def _sound(http: Request, state: AppState, generation: GenerationRequest[SoundRequest]) -> Response:
    began, format = time.monotonic(), generation.request.response_format or "wav"
    async with aclosing(state.jobs.run(generation, http.state.request_id, http.state.facts)) as items:
        output = [output async for _, output in items][-1]
    rate = output.audio_rate or 0
    with usable():  # a FLAC is made in a file
        data = await asyncio.to_thread(encode_sound, output.audio[0], format, rate)
    seconds = {name: round(value, 4) for name, value in output.stage_durations.items()}
    omni = {"seed": output.seed, "rate": rate, "seconds": round(output.audio[0].shape[-1] / rate, 3)}
    omni |= {"computed_steps": output.computed_steps, "skipped_steps": output.skipped_steps}
    headers = {
        "x-model": generation.model.encode("ascii", "replace").decode(),
        "x-inference-time-s": f"{time.monotonic() - began:.3f}",
        "x-stage-durations": json.dumps(seconds),
        "x-omni": json.dumps(omni | {"warnings": http.state.warnings}),
    }
    return Response(data, media_type=_MEDIA[format], headers=headers)
