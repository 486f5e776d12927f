"""`vllm-omni calibrate`: measure a model into a profile file, from which the cache plans its steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import generation_defaults
from vllm_omni.entrypoints.cli.engine_flags import add_engine_flags, add_model, call_arguments, engine_args
from vllm_omni.entrypoints.cli.flags import command_parser
from vllm_omni.envs import profile_folder
from vllm_omni.quality.pairs import read_prompts

JUDGED_PAIRS = 64
HELD_OUT_SEEDS = 49_000  # away from calibration's
DESCRIPTION = """Some prompts run uncached. Their magnitude curve and the Gram matrix of their
residuals are averaged and written with their provenance, and a chart beside
them. The engine finds the profile by the model's weights."""
EXAMPLES = """
  vllm-omni calibrate MODEL --prompts prompts.txt                 at the model's own size and number of steps
  vllm-omni calibrate MODEL --prompts prompts.txt --steps 20      a profile for each number of steps you serve
  vllm-omni calibrate MODEL --prompts prompts.txt --hold-out      also choose the preset "auto", on prompts held out
"""


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Add the command with its options."""
    parser = command_parser(commands, "calibrate", summary, DESCRIPTION, EXAMPLES)
    add_model(parser)
    add_engine_flags(parser, "dtype", "device", "enable_cpu_offload")
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help="text file, one prompt a line; 8 to 32 are enough")
    add("--limit", type=int, default=32, metavar="N", help="most prompts used, evenly spread (default: 32)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the first prompt, counted up (default: 0)")
    add("--name", help="the profile's name (default: the model's)")
    held = f"keep every second line out of calibration, and choose the preset 'auto' on up to {JUDGED_PAIRS} of those"
    add("--hold-out", action="store_true", help=held)
    add("--out", metavar="FILE", help="profile file to write, .json (default: where the engine finds it)")
    return parser


def split(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every other line calibrates, beginning with the first; those between are held out, to judge by."""
    return list(prompts[0::2]), list(prompts[1::2])


def run(args: argparse.Namespace) -> int:
    """Write the profile and its chart."""
    config = OmniDiffusionConfig(**engine_args(args))
    held_out: list[str] = []
    prompts = read_prompts(Path(args.prompts), args.limit)
    if args.hold_out:
        prompts, held_out = split(read_prompts(Path(args.prompts)))
        prompts, held_out = prompts[: args.limit], held_out[:JUDGED_PAIRS]
    arguments = generation_defaults(args.model) | call_arguments(args)

    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.engine.malloc import keep_freed_memory
    from vllm_omni.quality.calibrate import calibrate, draw, judge

    keep_freed_memory()
    pipeline = load_pipeline(config)
    profile = calibrate(pipeline, prompts, args.name or Path(args.model).name, args.seed, **arguments)
    if held_out:
        profile = judge(pipeline, profile, held_out, args.seed + HELD_OUT_SEEDS, **arguments)
    file = f"{profile.name}-{profile.fingerprint}-{len(profile.ratios)}.json"  # one per step count
    out = Path(args.out) if args.out else profile_folder() / file
    profile.save(out)
    draw(profile, out.with_suffix(".png"))
    _report(profile)
    best = ", ".join(f"{speedup:g}x {predictor}" for speedup, predictor in profile.predictors)
    print(f"{out}: {len(prompts)} prompts, {len(profile.ratios)} steps; best predictors: {best}")
    print(f"chart: {out.with_suffix('.png')}")
    return 0


def _report(profile: Any) -> None:
    print(f"{'step':>4} {'sigma':>7} {'gamma':>8}")
    for step, (sigma, ratio) in enumerate(zip(profile.sigmas or (), profile.ratios, strict=True)):
        print(f"{step:4} {sigma:7.4f} {ratio:8.5f}")
    for nfe, row in profile.provenance.get("held_out", {}).get("forwards", {}).items():
        print(f"{nfe:>3} full forwards: {row['mean_db']:.1f} dB, worst {row['worst_db']:.1f}; as many steps: ", end="")
        print(f"{row['fewer_steps_mean_db']:.1f} dB, worst {row['fewer_steps_worst_db']:.1f}")
