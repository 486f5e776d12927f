"""How near any mask comes: a search over masks at equal full forwards, beside the planner's and fewer steps.

It starts at the planner's, with its own weights, since tuned ones are of one mask. In each round one
or two computed steps are moved, in several ways; the nearest of those is kept if it is nearer than all before. What was
found is then run on other prompts. This says what a better search could still gain with the profile's matrix;
some dozens of masks are tried, so that the best of all masks may be nearer still.

    python benchmarks/bound.py MODEL --profile FILE      MODEL: demo, or a folder with a captions.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import begin, last_line, table

FIRST_SEED = 980_000
SIDES = ("planned", "searched", "fewer steps")
Mask = tuple[bool, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--profile", help="profile file or name (default: the model's own)")
    parser.add_argument("--forwards", type=int, nargs="+", default=[9, 7])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--variations", type=int, default=8, help="masks tried in each round")
    parser.add_argument("--prompts", type=int, default=6, help="that the search looks at")
    parser.add_argument("--held-out", type=int, default=16, help="that the result is run on")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.set_defaults(clock="wall")
    options = parser.parse_args()
    machine = begin(options)
    runs = Runs(options)
    figures = {nfe: search(runs, nfe, options) for nfe in options.forwards}
    shown = [
        [nfe, row["masks"], f"{row['gain_seen']:+.2f}", *(f"{row[s][0]:.2f} / {row[s][1]:.2f}" for s in SIDES)]
        for nfe, row in figures.items()
    ]
    table(["full forwards", "masks", "gain where searched, dB", *(f"{side}, mean / lowest" for side in SIDES)], shown)
    last_line({"benchmark": "bound", **machine, "model": options.model, "figures": figures})


class Runs:
    """The model, its profile and its prompts; what a mask is worth on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm_omni.diffusion.cache.profile import find_profiles, fingerprint, named_profile
        from vllm_omni.diffusion.data import OmniDiffusionConfig
        from vllm_omni.diffusion.loader import load_pipeline
        from vllm_omni.learning import nearest
        from vllm_omni.model_folder import generation_defaults, resolve_model

        self.pipeline = load_pipeline(OmniDiffusionConfig(model=options.model, dtype="float32"))
        self.arguments = generation_defaults(options.model)
        steps = self.arguments["num_inference_steps"]
        found = find_profiles(options.model, fingerprint(self.pipeline.transformer))
        profile = named_profile(options.profile) if options.profile else nearest(found, steps)
        if profile is None or profile.gram is None:
            raise SystemExit("needs a profile with a matrix: vllm-omni calibrate MODEL --prompts FILE")
        self.profile: Any = profile.model_copy(update={"budgets": ()})
        captions = (Path(resolve_model(options.model)) / "captions.txt").read_text().splitlines()
        self.seen, self.unseen = captions[::2][-options.prompts :], captions[1::2][-options.held_out :]

    def plan(self, cache: dict[str, Any], schedule: Any) -> Any:
        """What a request with these settings would do, by the planner's own weights."""
        from vllm_omni.diffusion.cache.plan.compose import compose
        from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, parse

        return compose(parse("magcache", DiffusionCacheConfig(**cache)), self.profile.ratios, self.profile, schedule)

    def of(self, mask: Mask) -> Any:
        """The plan, for a trial, that computes these steps."""
        return partial(self.plan, {"steps_mask": mask})

    def decibels(self, plans: Sequence[Any], unseen: bool = False) -> np.ndarray:
        """(prompts, plans) PSNR of the picture; a plan that is a number is as many steps without a cache."""
        from vllm_omni.quality.calibrate import measured
        from vllm_omni.trials import Measurement, Trial

        prompts = self.unseen if unseen else self.seen
        trials = tuple(
            Trial(i, None, plan, picture=True) if isinstance(plan, int) else Trial(i, plan, picture=True)
            for i in range(len(prompts))
            for plan in plans
        )
        runs = Measurement("runs", trials, lambda away: [one.decibels for one in away])
        seed = FIRST_SEED + (len(self.seen) if unseen else 0)
        found = measured(runs, self.pipeline, prompts, seed, self.arguments)
        return np.array(found).reshape(len(prompts), len(plans))


def search(runs: Runs, nfe: int, options: argparse.Namespace) -> dict[str, Any]:
    """Each side's PSNR (mean, lowest) on other prompts than the search's, and what the search gained on its own."""
    from tqdm import tqdm

    start = best = runs.plan({"nfe": nfe}, runs.profile.schedule).compute
    rng, tried = np.random.default_rng(nfe), {start}
    first = level = float(runs.decibels([runs.of(start)]).mean())
    for _ in tqdm(range(options.rounds), desc=f"{nfe} full forwards", unit="round"):
        if not (masks := neighbours(best, options.variations, tried, rng)):
            break
        means = runs.decibels([runs.of(mask) for mask in masks]).mean(axis=0)
        if means.max() > level:
            level, best = float(means.max()), masks[int(means.argmax())]
    sides = [runs.of(start), runs.of(best), nfe]
    last = runs.decibels(sides, unseen=True)
    figures: dict[str, Any] = {
        side: [round(float(column.mean()), 2), round(float(column.min()), 2)]
        for side, column in zip(SIDES, last.T, strict=True)
    }
    figures |= {"gain_seen": round(level - first, 2), "masks": len(tried)}
    return figures | {"mask": "".join("x" if flag else "." for flag in best)}


def neighbours(mask: Mask, count: int, tried: set[Mask], rng: np.random.Generator) -> list[Mask]:
    """Up to `count` masks that were not tried, with one or two computed steps moved; the first and the last stay."""
    steps, found = len(mask), list[Mask]()
    for _ in range(1000):
        if len(found) == count:
            break
        computed = set(np.flatnonzero(mask).tolist())
        for _ in range(rng.integers(1, 3)):
            moved = int(rng.choice(sorted(computed - {0, steps - 1})))
            to = moved + int(rng.integers(-3, 4))
            if 0 < to < steps - 1 and to not in computed:
                computed = computed - {moved} | {to}
        new = tuple(step in computed for step in range(steps))
        if new not in tried:
            tried.add(new)
            found.append(new)
    return found


if __name__ == "__main__":
    main()
