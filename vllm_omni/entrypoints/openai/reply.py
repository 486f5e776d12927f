"""What a finished order looks like to an OpenAI client: pictures, usage, and how each was made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from vllm_omni.engine.interface import ModelInfo
from vllm_omni.entrypoints.openai import picture
from vllm_omni.entrypoints.openai.jobs import Jobs
from vllm_omni.entrypoints.openai.order import Order
from vllm_omni.entrypoints.openai.sse import Event
from vllm_omni.outputs import OmniRequestOutput


def usage(order: Order, info: ModelInfo, output: OmniRequestOutput) -> dict[str, Any]:
    """Latent tokens of all the pictures, and tokens of the text as the text encoder read it for one of them."""
    text = int(output.metrics["text_tokens"])
    made = round(order.width * order.height * info.tokens_per_pixel) * len(order.params)
    given = order.input_tokens
    return {
        "input_tokens": text + given,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "output_tokens": made,
        "output_tokens_details": {"image_tokens": made, "text_tokens": 0},
        "total_tokens": text + given + made,
    }


def looks(order: Order) -> dict[str, Any]:
    """The fields that every reply and event tells about its pictures."""
    return {"size": order.size, "quality": order.quality, "background": "opaque", "output_format": order.format}


def facts(order: Order, index: int, output: OmniRequestOutput) -> dict[str, Any]:
    """How one picture was made."""
    told: dict[str, Any] = {
        "image_index": index,
        "seed": output.seed if output.seed is not None else order.params[index].seed,
        "num_inference_steps": output.num_inference_steps,
        "computed_steps": output.computed_steps,
        "skipped_steps": output.skipped_steps,
        "plan": None if output.plan is None else [int(flag) for flag in output.plan],
        "cache": _settings(output.cache_settings),
    }
    if order.fields.include_timings:
        told["timings"] = {
            name: round(value, 4)
            for name, value in {**output.stage_durations, **output.metrics}.items()
            if name.endswith("_s")
        }
    return told


def _settings(settings: dict[str, Any] | None) -> dict[str, Any] | str:
    """The settings that a picture was made with, without curves; "off" where there was no cache."""
    if settings is None:
        return "off"
    return {k: v for k, v in settings.items() if v is not None and not (isinstance(v, list | tuple) and len(v) > 64)}


def parameters(order: Order, index: int, output: OmniRequestOutput) -> dict[str, Any]:
    """What makes the picture again: the fields of a request, as JSON."""
    params = order.params[index]
    values = {
        "prompt": order.fields.prompt,
        "negative_prompt": params.negative_prompt,
        "model": order.model,
        "size": order.size,
        "seed": output.seed if output.seed is not None else params.seed,
        "num_inference_steps": output.num_inference_steps or params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "true_cfg_scale": params.true_cfg_scale,
        "strength": params.strength,
        "cache": params.cache,
        "lora": None if not params.lora_request else [{"name": n, "scale": s} for n, s in params.lora_request],
    }
    return {name: value for name, value in values.items() if value is not None}


async def encoded(order: Order, index: int, output: OmniRequestOutput, metadata: bool) -> str:
    """base64 of the (first) picture of an output; encoding stays off the event loop."""
    told = parameters(order, index, output) if metadata else None
    image, compression = output.images[0], order.fields.output_compression
    return await asyncio.to_thread(picture.encode, image, order.format, compression, told)


async def collect(jobs: Jobs, order: Order, job_id: str, metadata: bool) -> dict[str, Any]:
    """The `ImagesResponse` of an order."""
    data: list[dict[str, Any]] = [{} for _ in order.params]
    told: dict[str, Any] = {}
    made: list[dict[str, Any]] = [{} for _ in order.params]
    async with aclosing(jobs.run(order, job_id)) as items:  # type: ignore[type-var]
        async for index, output in items:
            if output.finished:
                told["usage"] = usage(order, jobs.engine.info, output)
                made[index] = facts(order, index, output)
                data[index] = {
                    "b64_json": await encoded(order, index, output, metadata),
                    "seed": made[index]["seed"],
                }
    if order.fields.safety_identifier is not None:
        told["safety_identifier"] = order.fields.safety_identifier
    told["omni"] = {"request_id": job_id, "model": order.model, "images": made, "warnings": list(order.warnings)}
    return {"created": int(time.time()), "data": data, **looks(order), **told}


async def events(jobs: Jobs, order: Order, job_id: str, metadata: bool, kind: str) -> AsyncIterator[Event]:
    """Partial pictures, progress where it was asked for, and one completed picture for each of the order.

    `kind`: image_generation or image_edit.
    """
    partials = [0] * len(order.params)
    async with aclosing(jobs.run(order, job_id)) as items:  # type: ignore[type-var]
        async for index, output in items:
            base = {"created_at": int(time.time()), **looks(order)}
            if output.finished:
                told = usage(order, jobs.engine.info, output)
                del told["output_tokens_details"]  # which an event's usage has not
                done = {
                    **base,
                    "b64_json": await encoded(order, index, output, metadata),
                    "usage": told,
                    "omni": {"request_id": job_id, **facts(order, index, output)},
                }
                yield f"{kind}.completed", {"type": f"{kind}.completed", **done}
                continue
            where = {
                "request_id": job_id,
                "image_index": index,
                "step": output.step,
                "total_steps": output.num_inference_steps,
                "computed_steps": output.computed_steps,
                "skipped_steps": output.skipped_steps,
            }
            if output.images and partials[index] < order.partial_images:
                partial = {
                    "b64_json": await encoded(order, index, output, metadata=False),
                    "partial_image_index": partials[index],
                    "omni": where,
                }
                partials[index] += 1
                yield f"{kind}.partial_image", {"type": f"{kind}.partial_image", **base, **partial}
            elif order.fields.stream_progress:
                yield f"{kind}.progress", {"type": f"{kind}.progress", "omni": where}
