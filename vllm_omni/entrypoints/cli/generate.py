"""`vllm-omni generate`: prompts (and pictures) to files and a table."""

from __future__ import annotations

import argparse
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vllm_omni.cache_names import is_off
from vllm_omni.diffusion.cache.settings import PRESET_NAMES
from vllm_omni.entrypoints.cli.engine_flags import add_engine_flags, add_model, call_arguments, engine_args
from vllm_omni.entrypoints.cli.flags import command_parser, named_by_flag
from vllm_omni.entrypoints.cli.values import writable
from vllm_omni.errors import UnknownChoiceError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, check_text
from vllm_omni.model_folder import resolve_model
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.media import VIDEO_FORMATS, open_image, save_video
from vllm_omni.outputs.sound import SOUND_FORMATS, save_sound

CACHES = (*PRESET_NAMES, "off")
DESCRIPTION = """All prompts run in one continuous batch. The table shows the seed of each
picture, the steps that were computed, and those that the cache skipped."""
EXAMPLES = """
  vllm-omni generate demo 'red apple' 'cat face' --steps 28 --cache-backend magcache
  vllm-omni generate MODEL 'a lighthouse' --size 1024x768 --seed 7 --cache-backend magcache --cache fast
  vllm-omni generate MODEL 'the same in winter' --image house.png --out winter
"""


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Add the command with its options."""
    parser = command_parser(commands, "generate", summary, DESCRIPTION, EXAMPLES)
    add_model(parser)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="one or more prompts")
    add("--seed", type=int, metavar="N", help="seed of the first prompt, counted up for the others (default: random)")
    add("--num-outputs-per-prompt", "-n", type=int, default=1, metavar="N", help="pictures per prompt (default: 1)")
    add("--negative-prompt", metavar="PROMPT", help="what not to draw; needs --true-cfg-scale above 1 on FLUX")
    add("--true-cfg-scale", type=float, metavar="N", help="classifier-free guidance with a second branch")
    add("--cache", metavar="PRESET", help=f"a preset: {', '.join(CACHES)} (default: what --cache-config says)")
    add("--out", default="outputs", metavar="FOLDER", help="where the files are written (default: outputs)")
    engine = parser.add_argument_group("engine", "The model, its cache and its batch.")
    add_engine_flags(engine, "cache_backend", "cache_config", "max_num_seqs", "dtype", "device", "enable_cpu_offload")
    add_engine_flags(engine, "vae_use_tiling", "vae_use_slicing")
    media = parser.add_argument_group("media and adapters", "Pictures in, videos or sound out, LoRA, if it has them.")
    add = media.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="picture to edit or animate; again for several")
    add("--strength", type=float, metavar="N", help="how much of --image to replace, 0 to 1 (image-to-image models)")
    add("--num-frames", type=int, metavar="N", help="frames of a video (default: the model's own)")
    add("--fps", type=float, metavar="N", help="frames per second of a video's file (default: the model's own)")
    add("--video-format", choices=VIDEO_FORMATS, default="mp4", help="file format (default: mp4)")
    add("--seconds", type=float, metavar="N", help="length of a sound (default: the model's own)")
    add("--audio-format", choices=SOUND_FORMATS, default="wav", help="file format of a sound (default: wav)")
    add("--lora", action="append", default=[], metavar="FILE", help="adapter, .safetensors; again for several")
    add("--lora-scale", type=float, default=1.0, metavar="N", help="scale of the adapters (default: 1)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the pictures; 1 if a prompt failed."""
    adapters = {f"lora-{index}": file for index, file in enumerate(args.lora)}
    if args.cache not in (None, *CACHES) and not is_off(args.cache):
        raise UnknownChoiceError("--cache", args.cache, CACHES)
    engine = engine_args(args) | {"lora_modules": adapters}
    resolve_model(args.model)
    parameters = [_parameters(args, index, tuple(adapters)) for index in range(len(args.prompts))]
    pictures = [open_image(Path(file), "--image") for file in args.image]
    media = {"multi_modal_data": {"image": pictures if len(pictures) > 1 else pictures[0]}} if pictures else {}
    prompts = [{"prompt": check_text("prompt", prompt), **media} for prompt in args.prompts]
    folder = writable("--out", Path(args.out))

    from vllm_omni.engine.malloc import keep_freed_memory  # with torch: what is wrong above shows before its imports
    from vllm_omni.entrypoints.omni import Omni

    keep_freed_memory()
    with Omni(**engine) as omni:
        outputs = omni.generate(prompts, parameters)
    print(f"{'prompt':32} {'seed':>20} {'steps':>5} {'computed':>8} {'skipped':>7} {'seconds':>7}  file")
    for index, output in enumerate(outputs):
        _report(output, args.prompts[index], _save(output, folder, f"{index:03d}-{_slug(args.prompts[index])}", args))
    return 0 if all(output.ok for output in outputs) else 1


def _parameters(args: argparse.Namespace, index: int, adapters: tuple[str, ...]) -> OmniDiffusionSamplingParams:
    """What the prompt at `index` is drawn with."""
    with named_by_flag(OmniDiffusionSamplingParams, num_inference_steps="--steps", width="--size", height="--size"):
        return OmniDiffusionSamplingParams(
            **call_arguments(args),
            seed=None if args.seed is None else args.seed + index,
            true_cfg_scale=args.true_cfg_scale,
            negative_prompt=args.negative_prompt,
            num_outputs_per_prompt=args.num_outputs_per_prompt,
            strength=args.strength,
            num_frames=args.num_frames,
            fps=args.fps,
            seconds=args.seconds,
            cache=args.cache,
            lora_request=tuple((name, args.lora_scale) for name in adapters) or None,
        )


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"


def _save(output: OmniRequestOutput, folder: Path, stem: str, args: argparse.Namespace) -> list[str]:
    """The files of an output: pictures; clips, an MP4 with its sound; sound alone, or beside a format without any."""
    names: list[str] = []

    def file(number: int, suffix: str) -> Path:
        names.append(str(folder / f"{stem}{f'-{number}' if number else ''}.{suffix}"))
        return Path(names[-1])

    for number, picture in enumerate(output.images):
        picture.save(file(number, "png"))
    for number, (frames, sound) in enumerate(zip_longest(output.videos, output.audio)):
        if frames is not None:
            save_video(frames, file(number, args.video_format), output.fps or 16, sound, output.audio_rate)
        if sound is not None and (frames is None or args.video_format != "mp4"):
            save_sound(sound, file(number, args.audio_format), output.audio_rate or 0)
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
