"""The model and the engine on a command line: their flags, and what these say. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_omni.diffusion.cache.settings import ENGINE_BACKENDS, engine_backend
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.distributed.config import ParallelConfig
from vllm_omni.entrypoints.cli.flags import add_flags, given, named_by_flag
from vllm_omni.entrypoints.cli.values import cache_settings, json_object, lora_modules, parse_size
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import RESERVED

MODEL = "'demo' (comes with the package), a diffusers model folder, a hub id, or module:function of your own"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, and what a call of its pipeline takes: steps, size, guidance."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    add_size(parser)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the size and the guidance of pictures."""
    add = parser.add_argument
    add("--size", metavar="WxH", help="width and height in pixels, e.g. 1024x768 (default: the model's own)")
    guidance = "guidance embedded in the model, or classifier-free guidance (default: the model's own)"
    add("--guidance-scale", type=float, metavar="N", help=guidance)


def add_extra(parser: argparse.ArgumentParser) -> None:
    """Add what has no flag of its own."""
    text = """more arguments of the pipeline's call, e.g. '{"true_cfg_scale": 4, "negative_prompt": "blurry"}'"""
    parser.add_argument("--extra", metavar="JSON", help=text)


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What those flags say, as arguments of a pipeline's call; those alone that were given."""
    width, height = parse_size(args.size)
    steps = args.steps if isinstance(args.steps, int) else None  # `quality` takes several
    asked = {"num_inference_steps": steps, "width": width, "height": height, "guidance_scale": args.guidance_scale}
    extra = vars(args).get("extra")
    more = {} if extra is None else json_object("--extra", extra, '{"num_frames": 33}')
    for name in more.keys() & (RESERVED | {"prompt", "num_inference_steps"}):
        raise InvalidValueError("--extra", name, "holds what the command itself gives; leave that out")
    asked = {name: value for name, value in asked.items() if value is not None}
    for name in more.keys() & asked.keys():
        raise InvalidValueError("--extra", name, f"is {asked[name]!r} by a flag of its own; give it once")
    return asked | more


def add_engine_flags(group: Any, *names: str) -> None:
    """Add the engine's flags of those names, of all without any."""
    backends = f"what skips denoising steps: none, {', '.join(ENGINE_BACKENDS)}"
    add_flags(group, OmniDiffusionConfig, *names, cache_backend=backends)
    if not names:
        add_flags(group, ParallelConfig)


def engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's arguments of a parsed command line, as plain data, checked as far as that needs no torch."""
    found = given(args, OmniDiffusionConfig) | given(args, ParallelConfig)
    with named_by_flag(OmniDiffusionConfig, ParallelConfig):
        if "cache_backend" in found:
            found["cache_backend"] = engine_backend(found["cache_backend"])
        if "cache_config" in found:
            found["cache_config"] = cache_settings(found["cache_config"])
        if "default_sampling_params" in found:
            example = '{"num_inference_steps": 20}'
            text = found["default_sampling_params"]
            found["default_sampling_params"] = json_object("--default-sampling-params", text, example)
        if "lora_modules" in found:
            found["lora_modules"] = lora_modules(found["lora_modules"])
        OmniDiffusionConfig(**found)
    return found
