"""A loaded model in plain values, read from its pipeline once, so that a front end need not load one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from vllm_omni.diffusion.cache.settings import PRESETS
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.worker.preview import can_preview
from vllm_omni.engine.interface import ModelInfo, PictureInput
from vllm_omni.inputs.data import RENAMED

_DEFAULTS = (
    "num_inference_steps",
    "height",
    "width",
    "num_frames",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "strength",
)
# Arguments that take a picture; a class whose name has one of the words does not work without it.
_PICTURES = {
    "image": ("Edit", "Fill", "Inpaint", "Img2Img", "ImageToVideo", "Layered", "Refiner"),
    "images": (),
    "cond_image": (),
    "control_image": ("Control",),
    "mask_image": ("Fill", "Inpaint"),
    "mask": (),
    "control_mask": ("Inpaint",),
}
_MASKS = {"mask_image", "mask", "control_mask"}
_OPTIONAL = ("LTXConditionPipeline",)  # although its type does not say so
_SEVERAL = ("EditPlus", "QwenImage21")  # likewise
# What families call the factors of their VAE.
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def describe(engine: DiffusionEngine, tokens: dict[int, int]) -> ModelInfo:
    """`tokens`: latent tokens that were seen in the denoiser, by pixels of the picture."""
    worker, rates = engine.worker, engine.worker.arguments.rates
    pipeline = worker.pipeline
    signature = inspect.signature(type(pipeline).__call__).parameters
    video = any(name in signature for name in RENAMED["num_frames"])
    multiple = max(worker.arguments.multiple, _side(pipeline, worker.runner.modules) if video else 1)
    named = engine.config.model
    return ModelInfo(
        name=Path(named).expanduser().name if Path(named).expanduser().is_dir() else named,
        pipeline=type(pipeline).__name__,
        denoisers={name: type(module).__name__ for name, module in worker.runner.modules.items()},
        defaults=_defaults(pipeline, signature, worker.arguments.defaults),
        parameters=tuple(name for name in signature if name != "self"),
        size_multiple=multiple,
        tokens_per_pixel=next((count / pixels for pixels, count in tokens.items() if pixels), 1 / multiple**2),
        cache=_cache(engine),
        previews=can_preview(pipeline),
        pictures=picture_inputs(type(pipeline)),
        video_output=video,
        sound_output=rates.audio_rate is not None and not {"height", "num_frames", "video"} & {*signature},
        fps=rates.fps,
        frame_multiple=_first(pipeline, _TEMPORAL) if video else 1,
    )


def picture_inputs(pipeline: type) -> dict[str, PictureInput]:
    """The arguments that take a picture; whether one is needed shows in its default, its type, or the class's name."""
    name, inputs, taken = pipeline.__name__, {}, inspect.signature(pipeline.__call__).parameters
    for argument, words in _PICTURES.items():
        if (parameter := taken.get(argument)) is None or ("mask" in argument and not {*_PICTURES} & {*taken} - _MASKS):
            continue  # a mask alone is one of a video or of a sound
        kind = str(parameter.annotation)
        untyped = parameter.annotation is parameter.empty  # as in a modular pipeline, whose blocks choose by it
        optional = untyped or "None" in kind or "Optional" in kind or name in _OPTIONAL
        needed = parameter.default is parameter.empty or not optional or any(word in name for word in words)
        lists = "list[PIL.Image.Image" in kind and "Tensor" not in kind  # elsewhere a list is a batch
        inputs[argument] = PictureInput(needed, lists or any(word in name for word in _SEVERAL))
    return inputs


def _side(pipeline: Any, denoisers: Mapping[str, Any]) -> int:
    """Pixels of a token's side in a video: what the VAE packs, times the patch; an image pipeline knows its own."""
    configs = (module.config for module in denoisers.values() if isinstance(module, diffusers.ConfigMixin))
    patch = next((config.get("patch_size") for config in configs), None)
    sides = patch if isinstance(patch, list | tuple) else (patch or 1,)
    return _first(pipeline, _SPATIAL) * int(sides[-1])


def _first(pipeline: Any, names: tuple[str, ...]) -> int:
    return next((int(vars(pipeline)[name]) for name in names if name in vars(pipeline)), 1)


def _defaults(pipeline: Any, signature: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The model's own defaults, then the size its latents were made for, then its pipeline's signature."""
    values = {
        name: signature[name].default
        for name in _DEFAULTS
        if name in signature and isinstance(signature[name].default, int | float)
    }
    attributes = vars(pipeline)
    sample, scale = attributes.get("default_sample_size"), attributes.get("vae_scale_factor")
    if isinstance(sample, int) and isinstance(scale, int):
        values |= {name: sample * scale for name in ("height", "width") if name in signature}
    return values | {name: value for name, value in given.items() if isinstance(value, int | float | str)}


def _cache(engine: DiffusionEngine) -> dict[str, Any]:
    settings, presets = engine.worker.default_cache, {name: preset.as_config() for name, preset in PRESETS.items()}
    if settings is None:
        return {"backend": None, "settings": {}, "profiles": [], "presets": presets}
    told = settings.config.model_dump(exclude_none=True, exclude={"mag_ratios", "profile"})
    profiles = engine.worker.profile_names
    return {"backend": settings.backend, "settings": told, "profiles": profiles, "presets": presets}
