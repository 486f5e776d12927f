"""`vllm-omni calibrate`: measure a model into a profile file, from which the cache plans its steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli.engine_flags import (
    add_engine_flags,
    add_extra,
    add_model,
    call_arguments,
    engine_args,
)
from vllm_omni.entrypoints.cli.flags import command_parser
from vllm_omni.entrypoints.cli.values import writable_file
from vllm_omni.envs import profile_folder
from vllm_omni.errors import InvalidValueError
from vllm_omni.model_folder import generation_defaults, resolve_model
from vllm_omni.quality.pairs import own_captions, read_prompts

HELD_OUT_SEEDS = 49_000  # away from calibration's
MAX_NAME_BYTES = 200  # of a profile, whose file has fingerprint and steps in its name, too
DESCRIPTION = """Every second prompt runs uncached, and is measured: the magnitude curve, the matrix
of the residuals, and the gains, which say how far an error at each step moves
the end. A third of them, 8 at most, is left out of that: on these, plans are
compared at eight speed-ups, and the weights of the nearest of each are tuned to
where runs end. It is then measured on the other half of the prompts, beside the
published rule and fewer steps: the more prompts, the more can be promised, best
with 64 and --limit 32. All of it is written with its provenance, and a chart beside it. The engine finds
the profile by the model's weights; with it, a request can ask for decibels."""
EXAMPLES = """
  vllm-omni calibrate MODEL --prompts prompts.txt                 at the model's own size and number of steps
  vllm-omni calibrate MODEL --prompts prompts.txt --steps 20      a profile for each number of steps you serve
"""


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Add the command with its options."""
    parser = command_parser(commands, "calibrate", summary, DESCRIPTION, EXAMPLES)
    add_model(parser)
    add_engine_flags(parser, "dtype", "device", "enable_cpu_offload")
    add = parser.add_argument
    prompts = "text file, one prompt a line, 2 at least, 10 for decibels, best 64 (default: the model's captions.txt)"
    add("--prompts", metavar="FILE", help=prompts)
    limit = "most prompts to measure, and most to test on (default: %(default)s)"
    add("--limit", type=int, default=16, metavar="N", help=limit)
    add("--seed", type=int, default=0, metavar="N", help="seed of the first prompt, counted up (default: 0)")
    add("--name", help="the profile's name (default: the model's)")
    add("--out", metavar="FILE", help="profile file to write, .json (default: where the engine finds it)")
    add_extra(parser)
    return parser


def split(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every other line calibrates, beginning with the first; those between are held out, to judge by."""
    return list(prompts[0::2]), list(prompts[1::2])


def run(args: argparse.Namespace) -> int:
    """Write the profile and its chart."""
    config = OmniDiffusionConfig(**engine_args(args))
    if args.limit < 1:
        raise InvalidValueError("--limit", args.limit, "must be at least 1")
    name = args.name if args.name is not None else Path(resolve_model(args.model)).resolve().name
    if "/" in name or not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise InvalidValueError("--name", name, f"must have 1 to {MAX_NAME_BYTES} bytes, and no '/'")
    if args.out and not args.out.endswith(".json"):
        raise InvalidValueError("--out", args.out, "must end in .json: the engine takes no other file for a profile")
    if args.prompts is None:
        prompts, held_out = (own_captions(args.model, calibration=own)[: args.limit] for own in (True, False))
    else:
        prompts, held_out = (half[: args.limit] for half in split(read_prompts(Path(args.prompts))))
    if not held_out:
        raise InvalidValueError("--prompts", args.prompts, "must hold at least two prompts, to measure and to test")
    arguments = generation_defaults(args.model) | call_arguments(args)
    writable_file("--out", Path(args.out) if args.out else profile_folder() / "profile.json")

    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.engine.malloc import keep_freed_memory
    from vllm_omni.engine.waiting import wait_politely
    from vllm_omni.quality.calibrate import calibrate, draw, judge, unseen

    keep_freed_memory()
    wait_politely()
    pipeline = load_pipeline(config)
    measuring, choosing = unseen(prompts)
    profile = calibrate(pipeline, measuring, name, args.seed, **arguments)
    file = f"{profile.name}-{profile.fingerprint}-{len(profile.ratios)}.json"  # one per step count
    out = Path(args.out) if args.out else profile_folder() / file
    if not out.exists():  # of use already, should the rest be cut short; one that is there may have more to it
        profile.save(out)
    profile = judge(pipeline, profile, choosing, held_out, args.seed + HELD_OUT_SEEDS, **arguments)
    profile.save(out)
    draw(profile, out.with_suffix(".png"))
    _report(profile)
    halves = f"{len(measuring)} prompts, {len(choosing)} to choose by, {len(held_out)} held out"
    print(f"{out}: {halves}, {len(profile.ratios)} steps")
    print(f"chart: {out.with_suffix('.png')}")
    return 0


def _report(profile: CacheProfile) -> None:
    from vllm_omni.trials import LEAST_PAIRS

    print(f"{'step':>4} {'sigma':>7} {'gamma':>8} {'gain':>8}")
    gains = profile.gains or (float("nan"),) * len(profile.ratios)
    for step, row in enumerate(zip(profile.sigmas or (), profile.ratios, gains, strict=True)):
        print("{:4} {:7.4f} {:8.5f} {:8.4f}".format(step, *row))
    if not profile.budgets:
        return
    pairs = profile.budgets[0].pairs
    print(f"\nPSNR to the uncached output in dB, by {pairs} held-out prompts: the mean, and what nine")
    print("of ten outputs keep, as far as so many can say; that of the published rule and of fewer steps:")
    print(f"{'forwards':>8} {'mean':>6} {'kept':>6} {'rule':>6} {'fewer':>6}")
    for budget in profile.budgets:
        nfe = budget.forwards(len(profile.ratios))
        figures = (budget.psnr_mean, budget.psnr, budget.rule_psnr, budget.fewer_steps_psnr)
        shown = " ".join("     -" if value is None else f"{value:6.1f}" for value in figures)
        notes = {
            "tuned": budget.terms,
            "the published rule is nearest": budget.by_rule,
            "fewer steps are nearer": budget.fewer_steps_are_nearer,
        }
        print(f"{nfe:8} {shown}  {'; '.join(note for note, holds in notes.items() if holds)}".rstrip())
    if not profile.has_figures:
        least = f"{2 * LEAST_PAIRS} prompts at least, and --limit {LEAST_PAIRS}"
        print(f"No request can ask for decibels: that needs {least}.")
