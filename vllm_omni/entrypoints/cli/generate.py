"""`vllm-omni generate`: prompts (and pictures) to files and a table."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, count, zip_longest
from operator import methodcaller
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_omni.cache_names import is_off
from vllm_omni.diffusion.cache.settings import PRESET_NAMES
from vllm_omni.entrypoints.cli.engine_flags import add_engine_flags, add_model, call_arguments, engine_args
from vllm_omni.entrypoints.cli.flags import command_parser, named_by_flag
from vllm_omni.entrypoints.cli.values import adapter, writable
from vllm_omni.errors import InvalidValueError, UnknownChoiceError
from vllm_omni.files import write_whole
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, check_text
from vllm_omni.model_folder import resolve_model
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.media import VIDEO_FORMATS, encode_png, encode_video, open_image
from vllm_omni.outputs.sound import BY_FFMPEG, SOUND_FORMATS, encode_sound, ffmpeg_for

CACHES = (*PRESET_NAMES, "off")
DESCRIPTION = """All prompts run in one continuous batch, and each is written as it ends; no file
that is there is written over. The table shows the seed of each picture, the
steps that were computed, and those that the cache skipped."""
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
    fps = "frames per second of a video, which some models are told (default: the model's own)"
    add("--fps", type=float, metavar="N", help=fps)
    add("--video-format", choices=VIDEO_FORMATS, default="mp4", help="file format (default: mp4)")
    add("--seconds", type=float, metavar="N", help="length of a sound (default: the model's own)")
    add("--audio-format", choices=SOUND_FORMATS, default="wav", help="file format of a sound (default: wav)")
    add("--lora", action="append", default=[], metavar="FILE", help="adapter, .safetensors; again for several")
    add("--lora-scale", type=float, default=1.0, metavar="N", help="scale of the adapters (default: 1)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the pictures, each prompt's as it ends; 1 if a prompt failed, or a file."""
    adapters = {f"lora-{index}": adapter("--lora", file) for index, file in enumerate(args.lora)}
    if args.lora_scale != 1 and not adapters:
        raise InvalidValueError("--lora-scale", args.lora_scale, "is the scale of --lora, which is not given")
    if args.cache not in (None, *CACHES) and not is_off(args.cache):
        raise UnknownChoiceError("--cache", args.cache, CACHES)
    engine = engine_args(args) | {"lora_modules": adapters}
    resolve_model(args.model)
    parameters = [_parameters(args, index, tuple(adapters)) for index in range(len(args.prompts))]
    pictures = [open_image(Path(file), "--image") for file in args.image]
    media = {"multi_modal_data": {"image": pictures if len(pictures) > 1 else pictures[0]}} if pictures else {}
    prompts = [{"prompt": check_text("prompt", prompt), **media} for prompt in args.prompts]
    folder, codes = writable("--out", Path(args.out)), []

    from vllm_omni.engine.describe import describe
    from vllm_omni.engine.malloc import keep_freed_memory  # with torch: what is wrong above shows before its imports
    from vllm_omni.engine.waiting import wait_politely
    from vllm_omni.entrypoints.omni import Omni

    def ended(index: int, output: OmniRequestOutput) -> None:
        codes.append(_end(output, index, folder, args))

    keep_freed_memory()
    wait_politely()
    with Omni(**engine) as omni:
        sound = omni.engine.worker.arguments.rates.audio_rate is not None
        _check_encoders(describe(omni.engine, {}).video_output, sound, args)
        print(f"{'prompt':32} {'seed':>20} {'steps':>5} {'computed':>8} {'skipped':>7} {'seconds':>7}  file")
        omni.generate(prompts, parameters, on_output=ended)
    return max(codes)


def _check_encoders(video: bool, sound: bool, args: argparse.Namespace) -> None:
    """InvalidValueError, before anything is drawn, if what the model makes cannot be written in its format here."""
    wanted = [("--video-format", args.video_format)] if video else []
    wanted += [("--audio-format", args.audio_format)] if sound and wanted != [("--video-format", "mp4")] else []
    for flag, format in wanted:
        if format in BY_FFMPEG:
            try:
                ffmpeg_for(format)
            except InvalidValueError as error:
                raise error.named(flag) from None


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
    """The letters and digits of any script, with their marks; dashes between."""
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in prompt.lower())
    return "-".join(kept.split())[:40].strip("-") or "picture"


def _end(output: OmniRequestOutput, index: int, folder: Path, args: argparse.Namespace) -> int:
    """Save a prompt's output, and print its row; 1 if it failed, or a file of it could not be written."""
    prompt, names, faults = args.prompts[index], list[str](), list[str]()
    for files in _files(output, args):
        base = _free(folder, f"{index:03d}-{_slug(prompt)}", [*files])
        for suffix, encode in files.items():
            path = Path(f"{base}.{suffix}")
            try:
                data = encode()
                write_whole(path, methodcaller("write", data))
                names.append(str(path))
            except Exception as error:  # of a file system or an encoder: the next is not to suffer from it
                faults.append(f"{path} could not be written: {error}")
    shown = prompt if len(prompt) <= 32 else prompt[:29] + "..."
    if output.error is not None:
        tqdm.write(f"{shown:32} failed: {output.error}")
    else:
        tqdm.write(
            f"{shown:32} {output.seed!s:>20} {output.num_inference_steps:5} {output.computed_steps:8} "
            f"{output.skipped_steps:7} {output.metrics['total_s']:7.2f}  {' '.join(names)}"
        )
    for fault in faults:
        tqdm.write(f"vllm-omni generate: {fault}", file=sys.stderr)
    return 1 if faults or not output.ok else 0


def _files(output: OmniRequestOutput, args: argparse.Namespace) -> Iterator[dict[str, Callable[[], bytes]]]:
    """What makes the files of an output, by suffix, those of one name together.

    Pictures; clips, an MP4 with its sound; sound alone, or beside a format without any.
    """
    for picture in output.images:
        yield {"png": partial(encode_png, picture)}
    rate = output.audio_rate or 0
    for frames, sound in zip_longest(output.videos, output.audio):
        files: dict[str, Callable[[], bytes]] = {}
        if frames is not None:
            files[args.video_format] = partial(encode_video, frames, args.video_format, output.fps or 16, sound, rate)
        if sound is not None and (frames is None or args.video_format != "mp4"):
            files[args.audio_format] = partial(encode_sound, sound, args.audio_format, rate)
        yield files


def _free(folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    """`stem`, numbered where need be, so that no earlier file is written over."""
    names = chain([stem], (f"{stem}-{number}" for number in count(1)))
    return next(folder / name for name in names if not any((folder / f"{name}.{end}").exists() for end in suffixes))
