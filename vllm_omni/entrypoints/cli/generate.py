"""`vllm-omni generate`: prompts to PNG files and a table."""

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
            cache=args.cache,
        )
        for index in range(len(args.prompts))
    ]
    names = ["dtype", "device", "cache_backend", "max_num_seqs"]
    names += ["enable_cpu_offload", "vae_use_tiling", "vae_use_slicing"]
    engine_args: dict[str, Any] = {name: vars(args)[name] for name in names}
    with Omni(args.model, cache_config=json_object("--cache-config", args.cache_config), **engine_args) as omni:
        outputs = omni.generate(args.prompts, parameters)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'prompt':32} {'seed':>20} {'steps':>5} {'computed':>8} {'skipped':>7} {'seconds':>7}  file")
    for index, output in enumerate(outputs):
        _report(output, _save(output, folder, index))
    return 0 if all(output.ok for output in outputs) else 1


def _save(output: OmniRequestOutput, folder: Path, index: int) -> list[str]:
    stem = re.sub(r"[^a-z0-9]+", "-", str(output.prompt).lower()).strip("-")[:40] or "picture"
    names = []
    for number, image in enumerate(output.images):
        name = folder / f"{index:03d}-{stem}{f'-{number}' if number else ''}.png"
        image.save(name)
        names.append(str(name))
    return names


def _report(output: OmniRequestOutput, files: list[str]) -> None:
    prompt = str(output.prompt)
    prompt = prompt if len(prompt) <= 32 else prompt[:29] + "..."
    if output.error is not None:
        print(f"{prompt:32} failed: {output.error}")
        return
    seconds = output.metrics["total_s"]
    print(
        f"{prompt:32} {output.seed!s:>20} {output.num_inference_steps:5} {output.computed_steps:8} "
        f"{output.skipped_steps:7} {seconds:7.2f}  {' '.join(files)}"
    )
