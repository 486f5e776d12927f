"""What is served, how it is, and what its cache did: models, health, version, cache."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.openai import schemas
from vllm_omni.entrypoints.openai.errors import unavailable
from vllm_omni.entrypoints.openai.fields import QUALITY_CACHE
from vllm_omni.entrypoints.openai.order import check_model
from vllm_omni.entrypoints.openai.schemas import replies
from vllm_omni.entrypoints.openai.state import Served, served
from vllm_omni.errors import EngineDeadError
from vllm_omni.outputs.media import IMAGE_FORMATS
from vllm_omni.version import __version__

router = APIRouter(tags=["server"])


@router.get("/v1/models", responses=replies(schemas.Models))
async def models(request: Request) -> dict[str, Any]:
    """One entry per name that the model is served under."""
    here = served(request)
    return {"object": "list", "data": [_model(name, here) for name in here.config.model_names]}


@router.get("/v1/models/{model_id:path}", responses=replies(schemas.Model))
async def model(model_id: str, request: Request) -> dict[str, Any]:
    """A model with what it can do, its defaults and the server's limits."""
    here = served(request)
    return _model(check_model(model_id, here.config), here)


def _model(name: str, here: Served) -> dict[str, Any]:
    info, limits = here.info, here.config.limits
    return {
        "id": name,
        "object": "model",
        "created": int(here.started),
        "owned_by": "vllm-omni",
        "root": here.config.model_names[0],
        "omni": {
            "pipeline": info.pipeline,
            "denoisers": info.denoisers,
            "defaults": info.defaults,
            "capabilities": {
                "generations": not info.image_input and not info.video_output,
                "edits": info.image_input and not info.video_output,
                "videos": info.video_output,
                "input_reference": info.image_input and info.video_output,
                "partial_images": info.previews,
                "negative_prompt": "negative_prompt" in info.parameters,
                "output_formats": [name.lower() for name in IMAGE_FORMATS],
            },
            "limits": {
                "n": limits.max_n,
                "num_inference_steps": limits.max_steps,
                "pixels": limits.max_pixels,
                "size_multiple": info.size_multiple,
                **({"frames": limits.max_frames, "frame_multiple": info.frame_multiple} if info.video_output else {}),
                "prompt_characters": limits.max_prompt_characters,
                "timeout_s": limits.request_timeout_s,
            },
            "cache": {**info.cache, "quality": QUALITY_CACHE},
        },
    }


@router.get("/health/live", response_class=Response)
async def live() -> Response:
    """200 while the server's loop turns."""
    return Response(status_code=200)


@router.get("/health/ready", response_class=Response)
async def ready(request: Request) -> Response:
    """200 while requests can be served; 503 while the model loads, restarts or drains."""
    if not served(request).engine.ready:
        raise unavailable(EngineDeadError("not ready"), "not_ready", 5.0)
    return Response(status_code=200)


@router.get("/health", response_class=Response)
@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def health(request: Request) -> Response:
    """200 while the engine answers; asks it."""
    await served(request).engine.check_health()
    return Response(status_code=200)


@router.get("/version", responses=replies(schemas.Version))
async def version() -> dict[str, str]:
    """The package's version."""
    return {"version": __version__}


@router.get("/v1/omni/cache", responses=replies(schemas.Cache))
async def cache(request: Request) -> Response:
    """Backend, settings, presets, and the skips of the last requests."""
    here = served(request)
    stats = await here.engine.stats()
    total = stats.steps_computed + stats.steps_skipped
    return JSONResponse(
        {
            "object": "omni.cache",
            **here.info.cache,
            "quality": QUALITY_CACHE,
            "steps_computed": stats.steps_computed,
            "steps_skipped": stats.steps_skipped,
            "skip_ratio": stats.steps_skipped / total if total else 0.0,
            "bytes": stats.cache_bytes,
            "recent": [_recent(entry) for entry in stats.recent],
        }
    )


def _recent(entry: dict[str, Any]) -> dict[str, Any]:
    settings = entry.get("cache_settings")
    short = None if settings is None else {k: v for k, v in settings.items() if not isinstance(v, list | tuple)}
    return {**entry, "cache_settings": short}
