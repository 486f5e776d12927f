"""What was loaded, in plain values: read from a pipeline once, so that a front end need not load one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.cache.overrides import PRESETS
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.worker.preview import can_preview
from vllm_omni.engine.interface import ModelInfo

_TOLD = (
    "num_inference_steps",
    "height",
    "width",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "strength",
)


def describe(engine: DiffusionEngine, tokens: dict[int, int]) -> ModelInfo:
    """`tokens`: latent tokens that were seen in the denoiser, by pixels of the picture."""
    worker = engine.worker
    pipeline, multiple = worker.pipeline, worker.size_multiple
    signature = inspect.signature(type(pipeline).__call__).parameters
    named = engine.config.model
    return ModelInfo(
        name=Path(named).expanduser().name if Path(named).expanduser().is_dir() else named,
        pipeline=type(pipeline).__name__,
        denoisers={name: type(module).__name__ for name, module in worker.runner.modules.items()},
        defaults=_defaults(pipeline, signature, worker.defaults),
        parameters=tuple(name for name in signature if name != "self"),
        size_multiple=multiple,
        tokens_per_pixel=next((count / pixels for pixels, count in tokens.items() if pixels), 1 / multiple**2),
        cache=_cache(engine),
        previews=can_preview(pipeline),
        image_input="image" in signature,
        video_output="num_frames" in signature,
    )


def _defaults(pipeline: Any, signature: Any, told: dict[str, Any]) -> dict[str, Any]:
    """The model's own words, then its pipeline's signature, then the size its latents were made for."""
    values = {
        name: signature[name].default
        for name in _TOLD
        if name in signature and isinstance(signature[name].default, int | float)
    }
    attributes = vars(pipeline)
    sample, scale = attributes.get("default_sample_size"), attributes.get("vae_scale_factor")
    if isinstance(sample, int) and isinstance(scale, int):
        values |= {name: sample * scale for name in ("height", "width") if name in signature}
    return values | {name: value for name, value in told.items() if isinstance(value, int | float | str)}


def _cache(engine: DiffusionEngine) -> dict[str, Any]:
    choice = engine.worker.default_cache
    if choice is None:
        return {"backend": None, "settings": {}, "profile": None, "presets": PRESETS}
    backend, config = choice
    settings = config.model_dump(exclude_none=True, exclude={"mag_ratios", "profile"})
    return {"backend": backend, "settings": settings, "profile": engine.worker.profile_name, "presets": PRESETS}
