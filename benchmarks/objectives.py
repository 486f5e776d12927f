"""Would a plan know better if it knew more? PSNR in dB at equal full forwards, on the demo model, 28 steps.

Three things the engine does not use, against what it does use (costs expected from a profile, summed):

* the *worst* forecast instead of their sum: lexicographic minimax, as LeMiCa (NeurIPS 2025) orders its paths;
* *measured* path costs: for every run of skipped steps the model draws a picture that skips just that run, and how far
  its latents end from the uncached ones is what the run costs (LeMiCa's and DPCache's calibration), summed or minimax;
* the request's *own* matrix: a profile measured on the very prompt and seed, with which the same request then runs. No
  correction that watches a request while it runs can know more, so this bounds what one could gain.

Costs are of plain reuse, where a run of skipped steps depends on nothing before it; the plans they give run with reuse
and with `affine3`. Captions and seeds are held out; path costs are measured on captions for calibration.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import begin, last_line, table
from predictors import FIRST_SEED, STEPS

PREDICTORS = ("reuse", "affine3")
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--path-captions", type=int, default=1, help="captions that path costs are measured on")
    parser.add_argument("--forwards", type=int, nargs="+", default=[14, 9, 7])
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.set_defaults(clock="wall")
    options = parser.parse_args()
    machine = begin(options)
    figures = measure(options)
    rows = [[name, *(f"{mean:.1f} / {worst:.1f}" for mean, worst in row.values())] for name, row in figures.items()]
    table(["", *(f"{nfe} mean / worst" for nfe in options.forwards)], rows)
    last_line({"benchmark": "objectives", **machine, "steps": STEPS, "captions": options.captions, "psnr_db": figures})


def measure(options: Any) -> dict[str, dict[int, tuple[float, float]]]:
    """(mean, worst) by plan and predictor, and by number of full forwards."""
    from vllm_omni import Omni
    from vllm_omni.diffusion.cache.plan.planner import best_plan
    from vllm_omni.diffusion.cache.profile import load_profile
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.model_folder import generation_defaults
    from vllm_omni.quality.pairs import held_out

    captions = [pair.prompt for pair in held_out("demo", options.captions)]
    figures: dict[str, dict[int, tuple[float, float]]] = {}
    pipeline = load_pipeline(OmniDiffusionConfig(model="demo", dtype="float32"))
    with tempfile.TemporaryDirectory() as folder:
        own = own_profiles(pipeline, captions, Path(folder))  # before the engine has its hooks on the pipeline
        defaults = generation_defaults("demo")
        with Omni.from_pipe(pipeline, cache_backend="magcache", defaults=defaults, max_num_seqs=BATCH) as omni:
            exact = draw(omni, captions, ["off"] * len(captions), "np", STEPS)
            expected = expected_costs(load_profile(own[0]).sigmas)
            measured = path_costs(omni, options.path_captions)

            def note(name: str, nfe: int, caches: Any) -> None:
                each = caches if isinstance(caches, list) else [caches] * len(captions)
                got = draw(omni, captions, each, "np", nfe)
                decibels = [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(got, exact, strict=True)]
                figures.setdefault(name, {})[nfe] = (float(np.mean(decibels)), float(np.min(decibels)))

            for nfe in options.forwards:
                plans = {
                    "expected, sum": best_plan(expected, nfe),
                    "expected, minimax": minimax_plan(expected, nfe),
                    "measured, sum": best_plan(measured, nfe),
                    "measured, minimax": minimax_plan(measured, nfe),
                }
                for predictor in PREDICTORS:
                    for name, plan in plans.items():
                        note(f"{name}; {predictor}", nfe, {"steps_mask": [*map(int, plan)], "predictor": predictor})
                note("its own plan; affine3", nfe, {"nfe": nfe, "predictor": "affine3"})
                knowing = [{"nfe": nfe, "predictor": "affine3", "profile": str(file)} for file in own]
                note("its own plan, from the request's own matrix; affine3", nfe, knowing)
    return figures


def draw(
    omni: Any, captions: Sequence[str], caches: Sequence[Any], kind: str, forwards: int | None, seed: int | None = None
) -> list[np.ndarray]:
    """Float pictures or latents, each with its own cache setting; checks the full forwards of each.

    Seeds count up from FIRST_SEED, or are `seed` for all.
    """
    from vllm_omni import OmniDiffusionSamplingParams

    params = [
        OmniDiffusionSamplingParams(
            num_inference_steps=STEPS, seed=FIRST_SEED + i if seed is None else seed, cache=cache, output_type=kind
        )
        for i, cache in enumerate(caches)
    ]
    outputs = omni.generate(list(captions), params, use_tqdm=False)
    for output, cache in zip(outputs, caches, strict=True):
        if output.error is not None:
            raise output.error
        if forwards is not None and output.computed_steps != forwards:
            raise SystemExit(f"{cache}: {output.computed_steps} full forwards, not {forwards}")
    made = [output.latents if kind == "latent" else output.images[0] for output in outputs]
    return [np.asarray(each, dtype=np.float64) for each in made]


def own_profiles(pipeline: Any, captions: Sequence[str], folder: Path) -> list[Path]:
    """One profile per caption, measured on the very picture that the report draws with it."""
    from vllm_omni.diffusion.cache.magcache import MagCacheBackend
    from vllm_omni.diffusion.cache.profile import fingerprint
    from vllm_omni.diffusion.data import DiffusionCacheConfig
    from vllm_omni.model_folder import generation_defaults

    files = []
    for i, caption in enumerate(captions):
        backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
        backend.enable(pipeline)
        arguments = generation_defaults("demo") | {"num_inference_steps": STEPS}
        pipeline(caption, generator=torch.Generator().manual_seed(FIRST_SEED + i), output_type="latent", **arguments)
        assert backend.calibration is not None
        name = type(pipeline.transformer).__name__
        files.append(folder / f"{i}.json")
        backend.calibration.profile(f"own-{i}", name, fingerprint(pipeline.transformer)).save(files[-1])
        backend.disable(pipeline)
    return files


def expected_costs(sigmas: Sequence[float]) -> np.ndarray:
    """The planner's own costs of plain reuse, from the demo's profile."""
    from vllm_omni.diffusion.cache.plan.planner import gram_costs
    from vllm_omni.diffusion.cache.plan.predictors import resample_gram
    from vllm_omni.diffusion.cache.profile import shipped_profile

    profile = shipped_profile("demo")
    assert profile.sigmas is not None
    return gram_costs(resample_gram(np.asarray(profile.gram), profile.sigmas, sigmas), sigmas, "reuse")


def path_costs(omni: Any, captions: int) -> np.ndarray:
    """C[s, j]: the relative distance of the final latents when steps s + 1 .. j - 1 reuse the residual of step s."""
    from vllm_omni.quality.pairs import captions as all_captions

    costs = np.zeros((STEPS, STEPS + 1))
    runs = [(s, j) for s in range(STEPS) for j in range(s + 2, STEPS)]
    for number, caption in enumerate(all_captions("demo", calibration=True)[:captions]):
        masks = [[int(not s < t < j) for t in range(STEPS)] for s, j in runs]
        caches = ["off", *({"steps_mask": mask, "predictor": "reuse"} for mask in masks)]
        exact, *skipped = draw(omni, [caption] * len(caches), caches, "latent", None, seed=1_000 + number)
        for (s, j), got in zip(runs, skipped, strict=True):
            costs[s, j] += np.linalg.norm(got - exact) / np.linalg.norm(exact) / captions
    return costs


def minimax_plan(costs: np.ndarray, nfe: int) -> tuple[bool, ...]:
    """The plan whose dearest run of skipped steps costs least, then its second dearest, and so on.

    Exact: putting one more run into two plans does not change which comes first, so Bellman's recursion holds for
    sorted costs as it does for their sum. The first and the last step compute.
    """
    steps = costs.shape[0]
    best: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {0: ((), (0,))}
    for _ in range(nfe - 1):
        onward: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {}
        for last, (paid, path) in best.items():
            for step in range(last + 1, steps):
                found = tuple(sorted((*paid, float(costs[last, step])), reverse=True)), (*path, step)
                onward[step] = min(onward.get(step, found), found)
        best = onward
    return tuple(step in best[steps - 1][1] for step in range(steps))


if __name__ == "__main__":
    main()
