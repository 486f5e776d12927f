"""Does the planner know which plan is better? Rank correlation of predicted cost and measured error, per budget.

For each number of full forwards, variations of the planner's own plan, in which some computed steps are moved. Each is
run on prompts that calibration has not seen, and its error is the root mean square of the distances to the uncached
latents, or their mean in decibels. Spearman's rank correlation then says what a cost is worth: the planner's, the same
with equal gains, and with errors of steps that do not cancel one another, as it was until 2026-11-30. The ceiling is
what the true error would have, for so few prompts show it with noise.

    python benchmarks/plan_cost.py MODEL --profile FILE      MODEL: demo, or a folder with a captions.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import begin, last_line, table

FIRST_SEED = 970_000
BAR = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--profile", help="profile file or name (default: the model's own)")
    parser.add_argument("--forwards", type=int, nargs="+", default=[19, 14, 11, 9, 7, 5])
    parser.add_argument("--variations", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.set_defaults(clock="wall")
    options = parser.parse_args()
    machine = begin(options)
    figures = measure(options)
    names = list(next(iter(figures.values())))
    table(["full forwards", *names], [[nfe, *(f"{row[name]:.2f}" for name in names)] for nfe, row in figures.items()])
    lowest = min(row["of mean dB"] for row in figures.values())
    verdict = {"benchmark": "plan_cost", **machine, "model": options.model}
    last_line(verdict | {"spearman": figures, "lowest": lowest, "bar": BAR, "holds": lowest >= BAR})


def measure(options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Rank correlations by number of forwards and objective."""
    from tqdm import tqdm

    from vllm_omni.diffusion.cache.plan.planner import coherence, coherent_cost, step_weights
    from vllm_omni.diffusion.cache.profile import find_profiles, fingerprint, named_profile
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.learning import nearest
    from vllm_omni.model_folder import generation_defaults, resolve_model
    from vllm_omni.quality.calibrate import cache_of, enabled

    pipeline = load_pipeline(OmniDiffusionConfig(model=options.model, dtype="float32"))
    found = find_profiles(options.model, fingerprint(pipeline.transformer))
    arguments = generation_defaults(options.model)
    profile = named_profile(options.profile) if options.profile else nearest(found, arguments["num_inference_steps"])
    what = "residual" if profile is None else profile.forecasts
    gram, gains = (None, None) if profile is None else (profile.gram_of(what), profile.gains_of(what))
    if profile is None or gains is None or gram is None or profile.sigmas is None:
        raise SystemExit("needs a profile with gains: vllm-omni calibrate MODEL --prompts FILE")
    captions = (Path(resolve_model(options.model)) / "captions.txt").read_text().splitlines()[1::2]
    captions = captions[-options.prompts :]
    exact = latents(pipeline, captions, arguments)
    weights, even = (step_weights(profile.sigmas, g) for g in (np.asarray(gains), None))
    figures: dict[int, dict[str, float]] = {}
    for nfe in tqdm(options.forwards, desc="budgets"):
        plans = variations(nfe, options.variations, np.asarray(gram), weights)
        squares = []  # by plan and prompt
        for plan in plans:
            with enabled(cache_of(profile, steps_mask=plan), pipeline, profile):
                difference = latents(pipeline, captions, arguments) - exact
            squares.append(difference.pow(2).flatten(1).mean(dim=1).tolist())
        measured = np.array(squares)
        predicted = {
            "planner's": [coherent_cost(plan, np.asarray(gram), coherence(weights)) for plan in plans],
            "equal gains": [coherent_cost(plan, np.asarray(gram), coherence(even)) for plan in plans],
            "nothing cancels": [cost_of_each(plan, np.asarray(gram), weights) for plan in plans],
        }
        mean, decibels = measured.mean(axis=1), np.log(measured).mean(axis=1)
        row = {name: spearman(costs, mean) for name, costs in predicted.items()}
        row["ceiling"] = ceiling(measured)
        row["of mean dB"] = spearman(predicted["planner's"], decibels)
        row["its ceiling"] = ceiling(np.log(measured))
        figures[nfe] = {name: round(value, 3) for name, value in row.items()}
    return figures


def latents(pipeline: Any, captions: Sequence[str], arguments: dict[str, Any]) -> torch.Tensor:
    """The final latents (captions, ...) of one run for each, all in one call, in fp32."""
    generators = [torch.Generator("cpu").manual_seed(FIRST_SEED + i) for i in range(len(captions))]
    given = arguments | {n: [v] * len(captions) for n, v in arguments.items() if n == "negative_prompt"}
    made = pipeline(prompt=list(captions), generator=generators, output_type="latent", **given)
    return made[0].float()


def ceiling(squares: np.ndarray) -> float:
    """What the error itself, as so many prompts show it, can correlate with it at most: the root of the reliability.

    From the correlation of the halves of the prompts, for twice as many (Spearman 1910, Brown 1910). `squares`: of
    shape (plans, prompts).
    """
    halves = spearman(squares[:, ::2].mean(axis=1), squares[:, 1::2].mean(axis=1))
    return float(np.sqrt(max(0.0, 2 * halves / (1 + halves))))


def cost_of_each(plan: Sequence[bool], gram: np.ndarray, weights: np.ndarray) -> float:
    """The sum of what each skipped step's error is expected to move the end by, squared."""
    from vllm_omni.diffusion.cache.plan.planner import coherent_terms

    total = 0.0
    for step, terms in coherent_terms(tuple(plan), gram, weights).items():
        mix = np.zeros(len(plan))
        mix[step] = -1.0
        for anchor, factor in terms:
            mix[anchor] = factor
        total += weights[step] ** 2 * max(mix @ gram @ mix, 0.0)
    return float(total)


def variations(nfe: int, count: int, gram: np.ndarray, weights: np.ndarray) -> list[tuple[bool, ...]]:
    """`count` different plans of `nfe` full forwards: the planner's, and some with one to three of its steps moved."""
    from vllm_omni.diffusion.cache.plan.planner import best_plans

    rng = np.random.default_rng(nfe)
    steps = len(weights)
    good = best_plans(nfe, gram, weights, {0, steps - 1})[0]
    plans = {good: None}
    for _ in range(10_000):
        if len(plans) >= count:
            break
        computed = set(np.flatnonzero(good).tolist())
        for _ in range(rng.integers(1, 4)):
            inner = sorted(computed - {0, steps - 1})
            if not inner:
                break
            moved = int(rng.choice(inner))
            to = moved + int(rng.integers(-3, 4))
            if 0 < to < steps - 1 and to not in computed:
                computed = computed - {moved} | {to}
        plans[tuple(step in computed for step in range(steps))] = None
    return list(plans)[:count]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation (Spearman 1904); ties take their mean rank."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values)
    return np.array([(array < v).sum() + (array == v).sum() / 2 for v in array])


if __name__ == "__main__":
    main()
