"""What operators and trainers do to a server that runs: adapters, sleep, weights, traces; vLLM's and SGLang's names.

Folders are named by whoever calls, and read only inside those that the operator has allowed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.engine.wire import (
    Action,
    LoadAdapter,
    Sleep,
    StartProfile,
    StopProfile,
    UnloadAdapter,
    UpdateWeights,
    Wake,
)
from vllm_omni.entrypoints.openai.protocol import replies
from vllm_omni.entrypoints.openai.protocol.bodies import (
    body_schema,
    media_type,
    parse_json,
    read_text,
    validate,
    wrong_type,
)
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.state import AppState, State

router = APIRouter(tags=["admin"])
B = TypeVar("B", bound=BaseModel)
ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LoadAdapterBody(Body):
    """`load_inplace` is vLLM's: an adapter is not replaced, it is unloaded first."""

    lora_name: str = Field(pattern=f"^{ADAPTER_NAME.pattern}$", description="A new name, for `lora` or `model`.")
    lora_path: str = Field(min_length=1, max_length=4096, description="A folder or file inside an allowed folder.")
    load_inplace: Literal[False] = False


class UnloadAdapterBody(Body):
    lora_name: str = Field(max_length=128)
    lora_int_id: int | None = None


class SleepBody(Body):
    level: Literal[1, 2] = Field(default=1, description="1: weights to main memory; 2: dropped, and read again later.")
    tags: list[str] | None = Field(default=None, description="Without effect: all sleeps, and all wakes.")
    stage_ids: list[int] | None = Field(default=None, description="Without effect, likewise.")


class UpdateWeightsBody(Body):
    model_path: str = Field(min_length=1, max_length=4096, description="A model's folder inside an allowed folder.")
    target_modules: list[str] | None = Field(default=None, min_length=1, max_length=16, description="Default: all.")
    flush_cache: bool = Field(default=True, description="Without effect: caches live with their requests.")
    load_format: Literal["auto", "safetensors"] | None = Field(default=None, description="Only safetensors are read.")


class ProfileBody(Body):
    num_steps: int = Field(default=100, ge=1, le=10_000, description="Steps of the engine; the trace then ends itself.")


@router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadAdapterBody, "application/json"))
@router.post("/load_lora_adapter", include_in_schema=False)
async def load_lora_adapter(http: Request, state: State) -> replies.Condition:
    """One more adapter; requests name it as `lora` or as their `model`. 409 if all places are in use."""
    body = await read(http, LoadAdapterBody)
    if body.lora_name in state.config.model_names:
        raise invalid("lora_name", "is the name of the model")
    path = await asyncio.to_thread(allowed, "lora_path", body.lora_path, state.config.allowed_model_folders)
    return await _do(state, LoadAdapter(body.lora_name, str(path), [name for name, _ in state.server_adapters]))


@router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadAdapterBody, "application/json"))
@router.post("/unload_lora_adapter", include_in_schema=False)
async def unload_lora_adapter(http: Request, state: State) -> replies.Condition:
    """No new request gets the adapter; those that have it keep it, and with the last of them it goes."""
    return await _do(state, UnloadAdapter((await read(http, UnloadAdapterBody)).lora_name))


@router.post("/sleep", openapi_extra=body_schema(SleepBody, "application/json", needed=False))
@router.post("/v1/omni/sleep", include_in_schema=False)
@router.post("/release_memory_occupation", include_in_schema=False)
async def sleep(http: Request, state: State) -> replies.Condition:
    """Accepted requests end, new ones get a 503; then the device's memory is free, until `/wake_up`."""
    return await _do(state, Sleep((await read(http, SleepBody)).level))


@router.post("/wake_up", openapi_extra=body_schema(SleepBody, "application/json", needed=False))
@router.post("/v1/omni/wake_up", include_in_schema=False)
@router.post("/v1/omni/wakeup", include_in_schema=False)
@router.post("/resume_memory_occupation", include_in_schema=False)
async def wake_up(http: Request, state: State) -> replies.Condition:
    """Weights are where they were; 200 also if nothing slept, 409 if they cannot be read."""
    await read(http, SleepBody)
    return await _do(state, Wake())


@router.get("/is_sleeping")
async def is_sleeping(state: State) -> replies.Sleeping:
    """Whether the engine sleeps, and how deep."""
    level = state.engine.condition.asleep
    return replies.Sleeping(is_sleeping=level > 0, level=level)


@router.post("/update_weights_from_disk", openapi_extra=body_schema(UpdateWeightsBody, "application/json"))
async def update_weights_from_disk(http: Request, state: State) -> replies.Condition:
    """Running requests end with the weights that they began with; those that wait get the new ones."""
    body = await read(http, UpdateWeightsBody)
    path = await asyncio.to_thread(allowed, "model_path", body.model_path, state.config.allowed_model_folders)
    return await _do(state, UpdateWeights(str(path), body.target_modules))


@router.post("/start_profile", openapi_extra=body_schema(ProfileBody, "application/json", needed=False))
async def start_profile(http: Request, state: State) -> replies.Condition:
    """A trace of the next steps (torch.profiler), for chrome://tracing or Perfetto; 409 if one is being made."""
    body, folder = await read(http, ProfileBody), state.config.profiler_dir
    if folder is None:
        raise ApiError(400, "traces have no folder; start the server with --profiler-dir FOLDER", "not_enabled")
    return await _do(state, StartProfile(str(folder.expanduser().absolute()), body.num_steps))


@router.post("/stop_profile")
async def stop_profile(http: Request, state: State) -> replies.Condition:
    """The trace is written; 409 if none is being made."""
    await read(http, Body)
    return await _do(state, StopProfile())


def allowed(field: str, given: str, folders: Sequence[Path]) -> Path:
    """What `given` names, links and `..` resolved: nothing outside `folders`, nor a link that leads out of them."""
    if not folders:
        hint = "this server loads nothing by its address; start it with --allowed-model-folders FOLDER"
        raise ApiError(403, hint, "not_enabled", field, "permission_error")
    outside = ApiError(403, f"{field} is not inside an allowed folder", "forbidden_path", field, "permission_error")
    roots = [folder.expanduser().resolve() for folder in folders]

    def inside(path: Path) -> bool:
        return any(path.resolve().is_relative_to(root) for root in roots)

    try:
        candidates = [path for root in roots if inside(path := root / given)]
        found = next((path.resolve() for path in candidates if path.exists()), None)
        if candidates and found is None:
            raise ApiError(404, f"{field} does not exist", "not_found", field)
        if found is None or not all(map(inside, found.rglob("*"))):
            raise outside
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, links in a circle
        raise outside from None
    return found


async def read(http: Request, kind: type[B]) -> B:
    """The body as JSON, the query's `level` beside it; a page of another site cannot send what this takes."""
    data, media = await read_text(http, http.app.state.omni.config.limits), media_type(http)
    if media != "application/json" and (data or media or "origin" in http.headers):
        raise wrong_type("application/json", media)
    fields: dict[str, Any] = parse_json(data) if data else {}
    if issubclass(kind, SleepBody) and (level := http.query_params.get("level")) is not None:
        fields.setdefault("level", int(level) if level in ("1", "2") else level)
    return validate(kind, fields, strict=True)


async def _do(state: AppState, action: Action) -> replies.Condition:
    condition = await state.engine.control(action)
    folder = next(reversed(condition.weights.values()), None)
    return replies.Condition(
        message=f"{type(action).__name__} is done",
        adapters=list(condition.adapters),
        weights=None if folder is None else Path(folder).name,
        is_sleeping=condition.asleep > 0,
        level=condition.asleep,
        profiling=condition.profiling,
    )
