"""SGLang's routes for adapters: they are set for the whole server, and every request that names none runs with them.

Weights are not merged, whatever the routes are called: a request that names its own adapters, or none (`lora: []`), is
served beside the others.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from vllm_omni.engine.wire import LoadAdapter
from vllm_omni.entrypoints.openai.admin import ADAPTER_NAME, Body, allowed, read
from vllm_omni.entrypoints.openai.protocol import replies
from vllm_omni.entrypoints.openai.protocol.bodies import body_schema
from vllm_omni.entrypoints.openai.protocol.errors import ApiError, invalid
from vllm_omni.entrypoints.openai.protocol.requests import MAX_ADAPTERS
from vllm_omni.entrypoints.openai.state import AppState, State

router = APIRouter(prefix="/v1", tags=["admin"])

Strength = float | list[float]


class _Target(Body):
    target: Literal["all", "transformer"] | list[Literal["all", "transformer"]] = "all"


class SetAdaptersBody(_Target):
    lora_nickname: str | list[str] = Field(description="The name of an adapter, or several; with a path it is loaded.")
    lora_path: str | list[str | None] | None = Field(default=None, description="Not needed for one that is loaded.")
    strength: Strength = 1.0


class MergeBody(_Target):
    strength: Strength = 1.0


@router.post("/set_lora", openapi_extra=body_schema(SetAdaptersBody, "application/json"))
async def set_lora(http: Request, state: State) -> replies.ServerAdapters:
    """Load adapters, unless they are there, and let requests that name none run with them."""
    body = await read(http, SetAdaptersBody)
    names = _listed(body.lora_nickname)
    if not 0 < len(names) <= MAX_ADAPTERS or len(set(names)) < len(names):
        raise invalid("lora_nickname", f"must name 1 to {MAX_ADAPTERS} adapters, each once")
    paths = _as_many("lora_path", body.lora_path, names)
    scales = _as_many("strength", body.strength, names)
    for name, path in zip(names, paths, strict=True):
        await _load(state, name, path, names)
    return _set(state, names, scales)


@router.post("/unmerge_lora_weights", openapi_extra=body_schema(_Target, "application/json", needed=False))
async def unmerge_lora_weights(http: Request, state: State) -> replies.ServerAdapters:
    """Requests that name no adapter run without one; those that were set stay loaded."""
    await read(http, _Target)
    state.merged = False
    return _told(state, "no adapter is set")


@router.post("/merge_lora_weights", openapi_extra=body_schema(MergeBody, "application/json", needed=False))
async def merge_lora_weights(http: Request, state: State) -> replies.ServerAdapters:
    """The adapters that were set last are set again."""
    body = await read(http, MergeBody)
    if not state.set_adapters:
        raise ApiError(409, "no adapter was set; POST /v1/set_lora first", "conflict")
    names = [name for name, _ in state.set_adapters]
    return _set(state, names, _as_many("strength", body.strength, names))


@router.get("/list_loras")
async def list_loras(state: State) -> replies.ListedAdapters:
    """The adapters that are loaded, and those that requests run with which name none."""
    return replies.ListedAdapters(
        loaded_adapters=[{"nickname": name, "path": state.folder_of(name)} for name in state.adapters],
        active={"transformer": _active(state)} if state.server_adapters else {},
    )


async def _load(state: AppState, name: str, path: str | None, keep: list[str]) -> None:
    if path is None:
        if name in state.adapters:
            return
        raise ApiError(404, f"{name[:100]!r} is not loaded; send its lora_path", "not_found", "lora_nickname")
    if not ADAPTER_NAME.fullmatch(name) or name in state.config.model_names:
        raise invalid("lora_nickname", "must be of letters, digits, _ and -, and not the name of the model")
    found = await asyncio.to_thread(allowed, "lora_path", path, state.config.allowed_model_folders)
    if name in state.adapters:
        if Path(state.adapters[name]).expanduser().resolve() == found:
            return
        fix = f"{name!r} is loaded from another place ({state.folder_of(name)}); unload it first, or give a new name"
        raise ApiError(409, fix, "conflict", "lora_nickname")
    await state.engine.control(LoadAdapter(name, str(found), keep))


def _set(state: AppState, names: list[str], scales: list[float]) -> replies.ServerAdapters:
    """Set all of them, or none if one has gone meanwhile."""
    if gone := [name for name in names if name not in state.adapters]:
        raise ApiError(409, f"{', '.join(gone)} is not loaded any more; load it again", "conflict", "lora_nickname")
    state.set_adapters = tuple(zip(names, scales, strict=True))
    state.merged = True
    return _told(state, f"{', '.join(names)} set")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_many(field: str, value: Any, names: list[str]) -> list[Any]:
    """A value for each name; a single one is for all."""
    values = value if isinstance(value, list) else [value] * len(names)
    if len(values) != len(names):
        raise invalid(field, f"must be one value, or {len(names)}: one for each lora_nickname")
    if field == "strength" and not all(-10 <= scale <= 10 for scale in values):
        raise invalid(field, "strength must be between -10 and 10")
    return values


def _active(state: AppState) -> list[dict[str, Any]]:
    return [
        {"nickname": name, "path": state.folder_of(name), "merged": True, "strength": scale}
        for name, scale in state.server_adapters
    ]


def _told(state: AppState, message: str) -> replies.ServerAdapters:
    return replies.ServerAdapters(message=message, active=_active(state))
