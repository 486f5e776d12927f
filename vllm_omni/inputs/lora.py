"""Which adapters a request runs with: names of loaded ones, and a scale each. Knows no weights and no paths."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from vllm_omni.errors import InvalidValueError
from vllm_omni.settings import Settings

Adapters = tuple[tuple[str, float], ...]  # (name, scale), in the order given; empty: the model alone


class LoRARequest(Settings):
    """One adapter by its registered name; `scale` multiplies its contribution, 0 leaves it out."""

    name: str = Field(min_length=1)
    scale: float = Field(default=1.0, ge=-10, le=10, allow_inf_nan=False)


def as_adapters(value: Any) -> Adapters:
    """`"style"`, `{"name": "style", "scale": 0.8}`, a `LoRARequest`, or a list of those, as (name, scale) pairs."""
    listed = value if isinstance(value, list | tuple) else [value]
    requests = [_one(entry) for entry in listed]
    names = [request.name for request in requests]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise InvalidValueError("lora_request", twice, "names an adapter twice; give it once, with one scale")
    return tuple((request.name, request.scale) for request in requests if request.scale != 0)


def _one(entry: Any) -> LoRARequest:
    if isinstance(entry, LoRARequest):
        return entry
    if isinstance(entry, tuple) and len(entry) == 2:
        return LoRARequest(name=entry[0], scale=entry[1])
    if isinstance(entry, str):
        return LoRARequest(name=entry)
    if isinstance(entry, dict):
        return LoRARequest.from_dict(entry)
    if isinstance(name := getattr(entry, "lora_name", None), str):  # vLLM's request
        return LoRARequest(name=name)
    raise InvalidValueError("lora_request", entry, "must be a registered name, or {'name': ..., 'scale': ...}")
