"""The `vllm-omni` command: sub-commands and what they share. Parses first, imports what is heavy afterwards."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_omni import check
from vllm_omni.entrypoints.cli import quality
from vllm_omni.errors import InvalidValueError, OmniError
from vllm_omni.outputs.media import VIDEO_FORMATS
from vllm_omni.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; 0, or 2 with one clear line on stderr for input that cannot be used.

    vLLM comes here too, with its own command line: `vllm serve MODEL --omni ...`.
    """
    code = _run([word for word in (sys.argv[1:] if argv is None else argv) if word != "--omni"])
    if argv is None and "--omni" in sys.argv:  # vLLM does not look at what it gets back
        sys.exit(code)
    return code


def _run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vllm-omni",
        description="Generate and serve pictures with diffusion transformers, with an activation cache per request.",
        epilog="examples: vllm-omni generate demo 'red apple' 'cat face' --steps 28 --cache-backend magcache; "
        "vllm-omni serve demo --cache-backend magcache (the same as `vllm serve demo --omni ...`)",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_calibrate(commands)
    quality.add_arguments(commands.add_parser("quality", help="a report: settings and peers against uncached pictures"))
    commands.add_parser("serve", help="an OpenAI-compatible image server", add_help=False)
    if words[:1] not in (["serve"], ["generate"], ["calibrate"], ["quality"]) and "--omni" in sys.argv:
        what = f"`vllm {words[0]} --omni`" if words else "`vllm --omni`"
        parser.error(f"{what} is nothing for diffusion models; leave --omni out, and vLLM handles it itself")
    serving = words[:1] == ["serve"]
    args = argparse.Namespace(command="serve") if serving else parser.parse_args(words)
    check.hide_broken_packages()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning OpenMP threads make a busy CPU 50 times slower
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns once per image processor without torchvision
    try:
        if (message := check.rival()) is not None:
            raise OmniError(message)
        if args.command == "serve":
            from vllm_omni.entrypoints.cli.serve import run_serve

            return run_serve(words[1:])
        if args.command == "generate":
            from vllm_omni.entrypoints.cli.generate import run
        elif args.command == "quality":
            run = quality.run
        else:
            from vllm_omni.entrypoints.cli.calibrate import run
        return run(args)
    except OmniError as error:
        print(f"vllm-omni {args.command}: {error}", file=sys.stderr)
        return 2


def json_object(field: str, text: str | None) -> dict[str, Any] | None:
    """A JSON object from the command line; InvalidValueError says where it breaks."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidValueError(field, text, f"must be JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidValueError(field, text, "must be a JSON object, e.g. '{\"mag_threshold\": 0.12}'")
    return value


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="'demo' (shipped with the package), a diffusers model folder, or a hub id")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels, e.g. 1024x1024 (default: the model's own)")
    parser.add_argument(
        "--guidance-scale", type=float, help="guidance embedded in the model, or classifier-free guidance"
    )
    parser.add_argument("--enable-cpu-offload", action="store_true", help="keep idle parts of the model in main memory")


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="prompts (and pictures) in, PNG or video files and a table out")
    _add_model(parser)
    parser.add_argument("prompts", nargs="+", help="one or more prompts; all run in one continuous batch")
    parser.add_argument(
        "--seed", type=int, help="seed of the first prompt, counted up for the others (default: random)"
    )
    parser.add_argument("--num-outputs-per-prompt", "-n", type=int, default=1, help="pictures per prompt (default 1)")
    parser.add_argument("--negative-prompt", help="what not to draw; needs --true-cfg-scale above 1 on FLUX")
    parser.add_argument("--true-cfg-scale", type=float, help="classifier-free guidance with a second branch")
    parser.add_argument(
        "--cache-backend", default="none", help="none (default), magcache, easycache, seacache, teacache or fbcache"
    )
    parser.add_argument("--cache-config", metavar="JSON", help="its settings, e.g. '{\"mag_threshold\": 0.12}'")
    parser.add_argument("--cache", help="a preset: auto, high, balanced, fast, paper; or off")
    media = parser.add_argument_group("pictures in, videos out, adapters (where the model takes them)")
    media.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture to edit or to animate; again for several"
    )
    media.add_argument("--strength", type=float, help="how much of --image to replace, 0 to 1 (image-to-image models)")
    media.add_argument("--num-frames", type=int, help="frames of a video (default: the model's own)")
    media.add_argument("--fps", type=float, help="frames per second of a video's file (default: the model's own)")
    media.add_argument("--video-format", choices=VIDEO_FORMATS, default="mp4", help="file format (default mp4)")
    media.add_argument(
        "--lora", action="append", default=[], metavar="FILE", help="LoRA adapter, .safetensors; again for several"
    )
    media.add_argument("--lora-scale", type=float, default=1.0, help="scale of the adapters (default 1)")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="requests in one batch (default 16)")
    parser.add_argument("--vae-use-tiling", action="store_true", help="decode large pictures in tiles")
    parser.add_argument("--vae-use-slicing", action="store_true", help="decode pictures one by one")
    parser.add_argument("--out", default="outputs", help="folder for the PNG files (default: outputs)")


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate", help="measure a model's magnitude curve and Gram matrix into a profile file"
    )
    _add_model(parser)
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="text file, one prompt a line; 8 to 32 are enough"
    )
    parser.add_argument("--limit", type=int, default=32, help="use at most so many prompts, evenly spread (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt, counted up (default 0)")
    parser.add_argument("--name", help="the profile's name (default: the model's)")
    parser.add_argument(
        "--hold-out",
        action="store_true",
        help="keep every second line out of calibration, and choose the preset 'auto' on up to 64 of those",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="profile file to write (.json), a chart beside it (default: where the engine finds it by itself)",
    )


if __name__ == "__main__":
    sys.exit(main())
