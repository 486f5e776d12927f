"""The first call that a pipeline makes of its denoiser, without making it."""

from __future__ import annotations

from typing import Any

import torch
from family import Family

from vllm_omni.diffusion.denoiser.discover import names_of


class _Seen(Exception):
    """Ends the pipeline."""


def first_call(family: Family, pipeline: Any, name: str = "transformer") -> dict[str, Any]:
    """The arguments by name."""
    module = pipeline.components[name]
    seen: dict[str, Any] = {}

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(dict(zip(names_of(module), args, strict=False)) | kwargs)
        raise _Seen

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    asked = {**family.settings, **family.prompt(0), **family.guided(3.0), "num_inference_steps": 4}
    try:
        pipeline(**asked, generator=torch.Generator("cpu").manual_seed(7), output_type=family.output)
    except _Seen:
        return seen
    finally:
        handle.remove()
    raise AssertionError(f"{family.name} has not called its {name}")
