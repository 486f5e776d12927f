"""What is served, how it is, and what its cache did: models, health, version, cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.interface import ReplicaStats
from vllm_omni.entrypoints.openai.protocol import replies
from vllm_omni.entrypoints.openai.protocol.bodies import check_model
from vllm_omni.entrypoints.openai.protocol.errors import unavailable
from vllm_omni.entrypoints.openai.protocol.requests import QUALITY_CACHE
from vllm_omni.entrypoints.openai.state import AppState, State
from vllm_omni.outputs.media import IMAGE_FORMATS
from vllm_omni.version import __version__

router = APIRouter(tags=["server"])


@router.get("/v1/models")
async def models(state: State) -> replies.Models:
    """One entry per name that the model is served under, and one per adapter."""
    names = [*state.config.model_names, *state.adapters]
    return replies.Models(data=[_model(name, state) for name in names])


@router.get("/models")
@router.get("/v1/model_info", include_in_schema=False)
async def model_info(state: State) -> replies.ModelInfo:
    """The model as SGLang's clients ask for it."""
    info = state.info
    letter, picture = {"image": "I", "video": "V", "sound": "A"}[info.output], info.pictures.get("image")
    task = f"T2{letter}" if picture is None else f"I2{letter}" if picture.needed else f"TI2{letter}"
    name = state.config.model_names[0]
    return replies.ModelInfo(model_path=name, task_type=task, pipeline_name=info.pipeline, pipeline_class=info.pipeline)


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, state: State) -> replies.Model:
    """A model with what it can do, its defaults and the server's limits."""
    check_model(model_id, state.config, state.adapters)
    return _model(model_id, state)


def _model(name: str, state: AppState) -> replies.Model:
    info, config = state.info, state.config
    if (path := state.adapters.get(name)) is not None:
        parent = config.model_names[0]
        return replies.Model(id=name, created=int(state.started), root=Path(path).name, parent=parent, omni={})
    needed = any(picture.needed for picture in info.pictures.values())
    video = {"frames": config.limits.max_frames, "frame_multiple": info.frame_multiple} if info.video_output else {}
    omni = {
        "pipeline": info.pipeline,
        "denoisers": info.denoisers,
        "defaults": info.defaults,
        "capabilities": {
            "generations": not needed and info.output == "image",
            "edits": bool(info.pictures) and info.output == "image",
            "videos": info.video_output,
            "sounds": info.sound_output,
            "input_reference": "image" in info.pictures and info.video_output,
            "pictures": {name: "needed" if one.needed else "optional" for name, one in info.pictures.items()},
            "partial_images": info.previews,
            "negative_prompt": "negative_prompt" in info.parameters,
            "output_formats": [name.lower() for name in IMAGE_FORMATS],
        },
        "limits": {
            "n": config.limits.max_n,
            "num_inference_steps": config.limits.max_steps,
            "pixels": config.limits.max_pixels,
            "size_multiple": info.size_multiple,
            **video,
            "prompt_characters": config.limits.max_prompt_characters,
            "timeout_s": config.limits.request_timeout_s,
        },
        "cache": {**info.cache, "quality": QUALITY_CACHE},
    }
    return replies.Model(id=name, created=int(state.started), root=config.model_names[0], omni=omni)


@router.get("/health/live", response_class=Response)
async def live() -> Response:
    """200 while the server's event loop runs."""
    return Response()


@router.get("/health/ready", response_class=Response)
async def ready(state: State) -> Response:
    """200 while requests can be served; 503 while the model loads, restarts, sleeps or drains."""
    if not state.engine.ready:
        raise unavailable("not ready", "not_ready", 5.0)
    return Response()


@router.get("/health", response_class=Response)
@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def health(state: State) -> Response:
    """200 while the engine answers; asks it."""
    await state.engine.check_health()
    return Response()


@router.get("/version")
async def version() -> replies.Version:
    """The package's version."""
    return replies.Version(version=__version__)


@router.get("/v1/omni/replicas")
async def replicas(state: State) -> replies.Replicas:
    """The engines behind this front; with a single one, it alone."""
    stats, engine = await state.engine.stats(), state.engine
    told = stats.replicas
    if isinstance(engine, ProcessEngineClient):
        alone = ReplicaStats(
            name="0",
            state=engine.state,
            running=stats.running,
            waiting=stats.waiting,
            queued_cost_s=stats.queued_cost_s,
            answered=sum(stats.requests.values()),
            restarts=stats.restarts,
            adapters=tuple(state.adapters),
        )
        told = (alone,)
    return replies.Replicas(data=[replies.Replica(**vars(one)) for one in told])


@router.get("/v1/omni/cache")
async def cache(state: State) -> replies.CacheReply:
    """Backend, settings, presets, what is known of the denoisers, and the skips of the last requests."""
    stats = await state.engine.stats()
    total = stats.steps_computed + stats.steps_skipped
    return replies.CacheReply(
        **state.info.cache | {"profiles": list(stats.profiles)},
        learning=stats.learning,
        quality=QUALITY_CACHE,
        steps_computed=stats.steps_computed,
        steps_skipped=stats.steps_skipped,
        skip_ratio=stats.steps_skipped / total if total else 0.0,
        bytes=stats.cache_bytes,
        denoisers=stats.denoisers,
        recent=[_recent(entry) for entry in stats.recent],
    )


def _recent(entry: dict[str, Any]) -> dict[str, Any]:
    """Without curves."""
    settings = entry.get("cache_settings")
    short = None if settings is None else {k: v for k, v in settings.items() if not isinstance(v, list | tuple)}
    return {**entry, "cache_settings": short}
