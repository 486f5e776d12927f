"""`vllm-omni generate`: prompts (and pictures) to files and a table."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from vllm_omni.entrypoints.cli.main import json_object
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.media import open_image, save_video


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """(width, height) of "64x48"; (None, None) for None."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if match is None:
        raise InvalidValueError("--size", size, "must be WIDTHxHEIGHT, e.g. 1024x768")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    """Write the pictures; 1 where a prompt failed."""
    width, height = parse_size(args.size)
    adapters = {f"lora-{index}": file for index, file in enumerate(args.lora)}
    parameters = [
        OmniDiffusionSamplingParams(
            num_inference_steps=args.steps,
            width=width,
            height=height,
            seed=None if args.seed is None else args.seed + index,
            guidance_scale=args.guidance_scale,
            true_cfg_scale=args.true_cfg_scale,
            negative_prompt=args.negative_prompt,
            num_outputs_per_prompt=args.num_outputs_per_prompt,
            strength=args.strength,
            num_frames=args.num_frames,
            fps=args.fps,
            cache=args.cache,
            lora_request=tuple((name, args.lora_scale) for name in adapters) or None,
        )
        for index in range(len(args.prompts))
    ]
    pictures = [open_image(Path(file), "--image") for file in args.image]
    media = {"multi_modal_data": {"image": pictures if len(pictures) > 1 else pictures[0]}} if pictures else {}
    prompts = [{"prompt": prompt, **media} for prompt in args.prompts]
    names = ["dtype", "device", "cache_backend", "max_num_seqs"]
    names += ["enable_cpu_offload", "vae_use_tiling", "vae_use_slicing"]
    engine_args: dict[str, Any] = {name: vars(args)[name] for name in names}
    config = json_object("--cache-config", args.cache_config)
    with Omni(args.model, cache_config=config, lora_modules=adapters, **engine_args) as omni:
        outputs = omni.generate(prompts, parameters)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'prompt':32} {'seed':>20} {'steps':>5} {'computed':>8} {'skipped':>7} {'seconds':>7}  file")
    for index, output in enumerate(outputs):
        _report(output, args.prompts[index], _save(output, folder, f"{index:03d}-{_slug(args.prompts[index])}", args))
    return 0 if all(output.ok for output in outputs) else 1


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"


def _save(output: OmniRequestOutput, folder: Path, stem: str, args: argparse.Namespace) -> list[str]:
    names = []
    for number, content in enumerate([*output.images, *output.videos]):
        suffix = args.video_format if output.videos else "png"
        name = folder / f"{stem}{f'-{number}' if number else ''}.{suffix}"
        if output.videos:
            save_video(content, name, output.fps or 16)
        else:
            content.save(name)
        names.append(str(name))
    return names


def _report(output: OmniRequestOutput, prompt: str, files: list[str]) -> None:
    prompt = prompt if len(prompt) <= 32 else prompt[:29] + "..."
    if output.error is not None:
        print(f"{prompt:32} failed: {output.error}")
        return
    seconds = output.metrics["total_s"]
    print(
        f"{prompt:32} {output.seed!s:>20} {output.num_inference_steps:5} {output.computed_steps:8} "
        f"{output.skipped_steps:7} {seconds:7.2f}  {' '.join(files)}"
    )
