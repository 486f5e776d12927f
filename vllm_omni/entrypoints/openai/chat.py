"""`/v1/chat/completions` for models that answer with pictures: the last user message is the prompt."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request

from vllm_omni.entrypoints.openai import media
from vllm_omni.entrypoints.openai.generation import check_makes, match_pictures, plan_images
from vllm_omni.entrypoints.openai.images import Generation, data_url, encoded, respond, usage_of
from vllm_omni.entrypoints.openai.protocol import replies
from vllm_omni.entrypoints.openai.protocol.bodies import Source, body_schema, check_request, read_json, validate
from vllm_omni.entrypoints.openai.protocol.errors import invalid
from vllm_omni.entrypoints.openai.protocol.requests import ABOUT_WORDS, ChatRequest, ImageRequest
from vllm_omni.entrypoints.openai.protocol.streams import Event, unless_gone
from vllm_omni.entrypoints.openai.state import AppState, State, salt_of

router = APIRouter(prefix="/v1/chat", tags=["chat"])


@router.post(
    "/completions",
    openapi_extra=body_schema(ChatRequest, "application/json"),
    response_model=replies.ChatReply,
    responses=replies.STREAM,
)
async def completions(http: Request, state: State) -> Any:
    """A message whose content is pictures, as data URLs."""
    check_makes(state.info, "image")
    body = await read_json(http, state.config.limits, curl=True)
    given = body.fields
    if "prompt" in given:
        raise invalid("prompt", "the prompt is the last user message", "unknown_parameter")
    own = {name: given.pop(name) for name in ChatRequest.model_fields if name in given}
    asked = validate(ChatRequest, own, strict=True)
    body.warnings.extend(f"{name} was ignored: it is about words" for name in ABOUT_WORDS if own.get(name))
    prompt, sources = read_messages(asked.messages)
    body = replace(body, fields={"prompt": prompt, **given})
    request = check_request(ImageRequest, body, state.config, state.adapters, state.server_adapters)
    matched = match_pictures(replace(body, sources=sources), state.info, "messages")
    loading = media.load(matched, state.config, state.jobs.decoder, request.n or 1)
    pictures = await unless_gone(http.receive, loading)
    generation = replace(plan_images(request, state.info, state.config.limits, pictures), salt=salt_of(http, request))
    chunks = _chunks(http, state, generation, with_usage=(asked.stream_options or {}).get("include_usage") is True)
    made = await respond(http, state, generation, chunks)
    return _completion(made, generation) if isinstance(made, replies.ImagesReply) else made


def read_messages(messages: list[dict[str, Any]]) -> tuple[str, list[Source]]:
    """(text of the last user message, its pictures)."""
    if any(not isinstance(message.get("role"), str) for message in messages):
        raise invalid("messages", "every message is an object with role and content")
    content = next((message.get("content") for message in reversed(messages) if message["role"] == "user"), None)
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or any(not isinstance(part, dict) for part in content):
        raise invalid("messages", "the last user message must have text, or a list of parts")
    text: list[str] = []
    sources: list[Source] = []
    for part in content:
        kind = part.get("type") or ("".join(part) if len(part) == 1 else None)  # vllm-omni's short form has no type
        if kind == "text" and isinstance(part.get("text"), str):
            text.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            sources.append(("messages", part["image_url"].get("url")))
        elif kind == "image" and isinstance(image := part.get("image"), str):
            sources.append(("messages", image if image.startswith(("data:", "https:")) else f"data:;base64,{image}"))
        else:
            raise invalid("messages", "a part is text, image_url with a URL, or image in base64")
    return "\n".join(text), sources


def _part(generation: Generation, b64: str) -> replies.Part:
    return replies.Part(image_url=replies.ImageUrl(url=data_url(generation, b64)))


def _completion(made: replies.ImagesReply, generation: Generation) -> replies.ChatReply:
    message = replies.Message(content=[_part(generation, picture.b64_json) for picture in made.data])
    return replies.ChatReply(
        id=f"chatcmpl-{made.omni.request_id}",
        created=made.created,
        model=generation.model,
        choices=[replies.Choice(message=message)],
        usage=_as_words(made.usage),
        omni=made.omni,
    )


def _as_words(usage: replies.Usage) -> replies.ChatUsage:
    return replies.ChatUsage(
        prompt_tokens=usage.input_tokens, completion_tokens=usage.output_tokens, total_tokens=usage.total_tokens
    )


async def _chunks(
    http: Request, state: AppState, generation: Generation, *, with_usage: bool
) -> AsyncGenerator[Event, None]:
    """A chunk per finished picture, then the reason of the end, then the usage if it was asked for, then [DONE]."""
    job_id, usage, made = http.state.request_id, None, 0
    base = {"id": f"chatcmpl-{job_id}", "object": "chat.completion.chunk", "created": int(time.time())}
    base |= {"usage": None} if with_usage else {}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> tuple[None, dict[str, Any]]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return None, {**base, "model": generation.model, "choices": [choice]}

    async with aclosing(state.jobs.run(generation, job_id, http.state.facts)) as items:
        async for index, output in items:
            if output.finished:
                usage = _as_words(usage_of(state, generation, output)).model_dump()
                part = _part(generation, await encoded(state, generation, index, output)).model_dump()
                # what clients add up: texts end to end, parts by their index
                yield chunk(({} if made else {"role": "assistant"}) | {"content": [part | {"index": made}]})
                made += 1
    name, last = chunk({}, "stop")
    yield name, last | {"omni": {"request_id": job_id, "warnings": http.state.warnings}}
    if with_usage:
        yield None, {**base, "model": generation.model, "choices": [], "usage": usage}
    yield None, "[DONE]"
