"""`/v1/chat/completions` for models that answer with pictures: the last user message is the prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.openai import picture, reply
from vllm_omni.entrypoints.openai.errors import invalid
from vllm_omni.entrypoints.openai.fields import check_fields, parse_json
from vllm_omni.entrypoints.openai.jobs import unless_gone
from vllm_omni.entrypoints.openai.order import Order, check_makes, check_model, make_order
from vllm_omni.entrypoints.openai.schemas import ChatReply, replies
from vllm_omni.entrypoints.openai.sse import Event, EventStream
from vllm_omni.entrypoints.openai.state import Served, served

router = APIRouter(prefix="/v1/chat", tags=["chat"])
# Fields of chat that say nothing about a picture: taken, so that a chat client needs no change, and without effect.
NO_EFFECT = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "frequency_penalty", "presence_penalty",
             "logprobs", "stop", "stream_options", "modalities", "metadata", "store")  # fmt: skip
MAX_MESSAGES = 256
_SCHEMA = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "model": {"type": "string"},
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": {"type": "string"}, "content": {}},
            },
        },
        "stream": {"type": "boolean"},
    },
}


@router.post(
    "/completions",
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _SCHEMA}}}},
    responses=replies(ChatReply, streams=True),
)
async def completions(request: Request) -> Response:
    """A message whose content is pictures, as data URLs."""
    here = served(request)
    check_makes(here.info, "image")
    given = parse_json(await request.body())
    messages = given.pop("messages", None)
    prompt, urls = read_messages(messages, here.config.limits.max_input_images)
    values = {key: value for key, value in given.items() if key not in NO_EFFECT}
    if "prompt" in values:
        raise invalid("prompt", "the prompt is the last user message", "unknown_parameter")
    fields = check_fields(
        {"prompt": prompt, **values},
        strict=True,
        allow_unknown=here.config.allow_unknown_fields,
        max_prompt=here.config.limits.max_prompt_characters,
    )
    check_model(fields.model, here.config)
    if bool(urls) != here.info.image_input:
        raise invalid("messages", "this model needs a picture" if not urls else "this model takes no picture")
    pictures = await asyncio.to_thread(lambda: tuple(picture.decode_url(url, "messages", here.config) for url in urls))
    order = make_order(fields, here.info, here.config, pictures)
    here.note(request, order)
    job_id = request.state.request_id
    if fields.stream:
        return EventStream(_chunks(here, order, job_id), here.config.sse_keep_alive_interval_s)
    with here.timed():
        made = await unless_gone(request.receive, reply.collect(here.jobs, order, job_id, here.config.png_metadata))
    return JSONResponse(_completion(made, order, job_id))


def read_messages(messages: Any, max_pictures: int) -> tuple[str, list[str]]:
    """(text of the last user message, its picture URLs)."""
    if not isinstance(messages, list) or not messages or len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"messages must be a list of 1 to {MAX_MESSAGES} messages")
    if any(not isinstance(m, dict) or not isinstance(m.get("role"), str) for m in messages):
        raise invalid("messages", "every message is an object with role and content")
    content = next((m.get("content") for m in reversed(messages) if m["role"] == "user"), None)
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or any(not isinstance(part, dict) for part in content):
        raise invalid("messages", "the last user message must have text, or a list of parts")
    text: list[str] = []
    urls: list[str] = []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            text.append(part["text"])
        elif part.get("type") == "image_url" and isinstance(part.get("image_url"), dict):
            urls.append(part["image_url"].get("url"))
        else:
            raise invalid("messages", "a part is text, or image_url with a URL")
    if len(urls) > max_pictures:
        raise invalid("messages", f"at most {max_pictures} pictures")
    return "\n".join(text), urls


def _part(order: Order, b64: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{order.format};base64,{b64}"}}


def _usage(told: dict[str, Any]) -> dict[str, int]:
    return {
        "prompt_tokens": told["input_tokens"],
        "completion_tokens": told["output_tokens"],
        "total_tokens": told["total_tokens"],
    }


def _completion(made: dict[str, Any], order: Order, job_id: str) -> dict[str, Any]:
    content = [_part(order, entry["b64_json"]) for entry in made["data"]]
    message = {"role": "assistant", "content": content}
    return {
        "id": f"chatcmpl-{job_id}",
        "object": "chat.completion",
        "created": made["created"],
        "model": order.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": _usage(made["usage"]),
        "omni": made["omni"],
    }


async def _chunks(here: Served, order: Order, job_id: str) -> AsyncIterator[Event]:
    """A chunk per finished picture, then the reason of the end, then [DONE]."""
    created = int(time.time())

    def chunk(delta: dict[str, Any], reason: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return None, {"id": f"chatcmpl-{job_id}", "object": "chat.completion.chunk", "created": created,
                      "model": order.model, "choices": [choice]}  # fmt: skip

    async with aclosing(here.jobs.run(order, job_id)) as items:  # type: ignore[type-var]
        async for index, output in items:
            if output.finished:
                b64 = await reply.encoded(order, index, output, here.config.png_metadata)
                yield chunk({"role": "assistant", "content": [_part(order, b64)]})
    yield chunk({}, "stop")
    yield None, "[DONE]"
