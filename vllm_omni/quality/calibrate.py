"""Measures what the cache must know of a checkpoint, on prompts that run uncached: its profile, and a chart of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vllm_omni.diffusion.cache.calibration import SKETCH
from vllm_omni.diffusion.cache.magcache import MagCacheBackend, MagCacheState
from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.plan.planner import forecast_error, step_weights
from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile, MaskName, MeasuredBudget, fingerprint
from vllm_omni.diffusion.cache.settings import CacheSettings, PredictorName
from vllm_omni.diffusion.data import DiffusionCacheConfig

SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5)
FORECASTS: dict[MaskName, tuple[PredictorName, ...]] = {
    "planned": ("linear", "gram", "affine", "affine3"),
    "rule": ("reuse", "linear", "gram", "affine", "affine3"),  # the published method is one of these
}
CHOSEN_ON = 4  # prompts on which a budget's mask and predictor are chosen
GAIN_PROMPTS = 4
GAIN_EVERY = 3  # steps between measured gains; docs/log.md has how few keep the plans the same


def calibrate(
    pipeline: Any, prompts: Sequence[str], name: str, seed: int = 0, sketch: int = SKETCH, **arguments: Any
) -> CacheProfile:
    """A profile of `pipeline`'s checkpoint: curve, matrix and gains, averaged over `prompts` (seeds count up).

    `arguments` go to the pipeline's call. `judge` adds what its plans are worth.
    """
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    assert backend.calibration is not None
    backend.calibration.width = sketch
    with enabled(backend, pipeline):
        for index, prompt in enumerate(tqdm(prompts, desc="curve and matrix", unit="prompt")):
            latents(pipeline, prompt, seed + index, arguments)
    scheduler = pipeline.scheduler
    profile = backend.calibration.profile(
        name,
        type(pipeline.transformer).__name__,
        fingerprint(pipeline.transformer),
        prompts_sha256=sha256_of(prompts),
        scheduler=type(scheduler).__name__,
        scheduler_config={k: v for k, v in scheduler.config.items() if "shift" in k},
        arguments=arguments,
        seed=seed,
    )
    gains, errors = measure_gains(pipeline, profile, prompts[:GAIN_PROMPTS], seed + len(prompts), arguments)
    return profile.model_copy(update={"gains": tuple(gains.tolist()), "gain_errors": tuple(errors.tolist())})


class _OneStale(MagCacheBackend):
    """Computes every step but one, which gets the residual of an earlier step of the same denoiser as it was."""

    def __init__(self, step: int, gap: int) -> None:
        super().__init__(DiffusionCacheConfig(mag_ratios=(1.0,)))
        self.step, self.gap = step, gap
        self.anchor: int | None = None  # the earlier step; None if `step` is the first of its denoiser

    def state(self, schedule: Schedule, settings: CacheSettings | None = None) -> MagCacheState:
        begin = next(part.start for part in schedule.segments if part.start <= self.step < part.stop)
        self.anchor = max(begin, self.step - self.gap) if self.step > begin else None
        mask = tuple(step != self.step or self.anchor is None for step in range(schedule.steps))
        terms: dict[int, Terms] = {} if self.anchor is None else {self.step: ((self.anchor, 1.0),)}
        return MagCacheState(CachePlan.of(mask, terms), self.store, {})


def measure_gains(
    pipeline: Any,
    profile: CacheProfile,
    prompts: Sequence[str],
    seed: int,
    arguments: dict[str, Any],
    every: int = GAIN_EVERY,
) -> tuple[np.ndarray, np.ndarray]:
    """(gain, standard error over prompts) of each step: see `CacheProfile`.

    A run is disturbed at one step, by the residual of a tenth of the run earlier, and finished; how far it ends from
    the undisturbed run is divided by the expected size of the disturbance. Steps between those measured are
    interpolated. Whatever is on the way counts: the head, guidance over all branches, the scheduler, the other steps.
    """
    assert profile.sigmas is not None and profile.gram is not None
    steps, gram, weights = len(profile.sigmas), np.asarray(profile.gram), step_weights(profile.sigmas)
    exact = [latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
    found: dict[int, np.ndarray] = {}
    for step in tqdm(sorted({*range(1, steps, every), steps - 1} - {0}), desc="gains", unit="step"):
        backend = _OneStale(step, max(1, round(steps / 10)))
        with enabled(backend, pipeline):
            got = [latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
        if backend.anchor is None:
            continue
        error = float(forecast_error(gram, [np.array(backend.anchor)], np.array(step), np.ones(1)))
        away = [(a - b).pow(2).mean().sqrt().item() for a, b in zip(got, exact, strict=True)]
        if error * weights[step] > 0:
            found[step] = np.asarray(away) / (error * weights[step])
    if not found:
        return np.ones(steps), np.zeros(steps)
    known = list(found)
    means = [float(np.sqrt(np.mean(np.square(found[step])))) for step in known]
    errors = [float(np.std(found[step]) / np.sqrt(len(prompts))) for step in known]
    every_step = np.arange(steps)
    return np.interp(every_step, known, means).round(6), np.interp(every_step, known, errors).round(6)


def choose(
    pipeline: Any, profile: CacheProfile, prompts: Sequence[str], seed: int, arguments: dict[str, Any]
) -> tuple[MeasuredBudget, ...]:
    """For each of some speed-ups the mask and the predictor whose latents stay nearest to the uncached ones.

    Nearest in the root mean square over prompts, which the worst of them lead.
    """
    exact = [latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
    steps, budgets = len(profile.ratios), []
    for nfe in tqdm(sorted({max(2, round(steps / s)) for s in SPEEDUPS} - {steps}, reverse=True), desc="choices"):
        errors: dict[MeasuredBudget, float] = {}
        for mask, predictor in ((m, p) for m, predictors in FORECASTS.items() for p in predictors):
            budget = MeasuredBudget(speedup=steps / nfe, mask=mask, predictor=predictor)
            with enabled(cache_of(profile, nfe=nfe), pipeline, profile.model_copy(update={"budgets": (budget,)})):
                got = [latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
            away = [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
            errors[budget] = float(np.sqrt(np.mean(np.square(away))))
        budgets.append(min(errors, key=errors.__getitem__))
    return tuple(budgets)


def judge(
    pipeline: Any,
    profile: CacheProfile,
    prompts: Sequence[str],
    held_out: Sequence[str],
    seed: int,
    **arguments: Any,
) -> CacheProfile:
    """`profile` with `budgets`: chosen on some of `prompts`, and measured on `held_out`, which decided nothing."""
    exact = _pictures(pipeline, held_out, seed, arguments)
    chosen = choose(pipeline, profile, prompts[:CHOSEN_ON], seed + len(held_out), arguments)
    profile = profile.model_copy(update={"budgets": chosen})
    curve_only = profile.model_copy(update={"gram": None, "budgets": ()})
    budgets = []
    for budget in tqdm(chosen, desc="held-out prompts", unit="budget"):
        nfe = round(len(profile.ratios) / budget.speedup)
        with enabled(cache_of(profile, nfe=nfe), pipeline, profile):
            cached = decibels(_pictures(pipeline, held_out, seed, arguments), exact)
        with enabled(cache_of(profile, nfe=nfe), pipeline, curve_only):
            by_rule = decibels(_pictures(pipeline, held_out, seed, arguments), exact)
        fewer = decibels(_pictures(pipeline, held_out, seed, arguments | {"num_inference_steps": nfe}), exact)
        figures = {"psnr": cached.min(), "psnr_mean": cached.mean(), "rule_psnr": by_rule.min()}
        figures |= {"fewer_steps_psnr": fewer.min()}
        measured = {name: round(float(value), 2) for name, value in figures.items()}
        budgets.append(budget.model_copy(update=measured | {"pairs": len(held_out)}))
    said = {"prompts": len(held_out), "prompts_sha256": sha256_of(held_out), "seed": seed}
    provenance = profile.provenance | {"held_out": said}
    return profile.model_copy(update={"budgets": tuple(budgets), "provenance": provenance})


def decibels(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """PSNR per picture, of pictures from 0 to 1."""
    squared = ((got - exact) ** 2).reshape(len(exact), -1).mean(axis=1)
    return -10 * np.log10(np.maximum(squared, 1e-30))


def sha256_of(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def cache_of(profile: CacheProfile, **settings: Any) -> MagCacheBackend:
    """A backend for `enabled`, with these settings, on a checkpoint that has this curve."""
    return MagCacheBackend(DiffusionCacheConfig(mag_ratios=profile.ratios, **settings))


def _pictures(pipeline: Any, prompts: Sequence[str], seed: int, arguments: dict[str, Any]) -> np.ndarray:
    rows = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed + index)
        images = pipeline(prompt, generator=generator, output_type="np", return_dict=False, **arguments)[0]
        rows.append(np.asarray(images[0], dtype=np.float64))
    return np.stack(rows)


@contextmanager
def enabled(backend: MagCacheBackend, pipeline: Any, profile: CacheProfile | None = None) -> Iterator[None]:
    """`backend` on `pipeline`; with `profile` instead of the checkpoint's own."""
    backend.enable(pipeline)
    backend.profiles = backend.profiles if profile is None else (profile,)
    try:
        yield
    finally:
        backend.disable(pipeline)


def latents(pipeline: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> torch.Tensor:
    """The final latents of one run, in fp32."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(prompt, generator=generator, output_type="latent", return_dict=False, **arguments)[0].float()


def draw(profile: CacheProfile, file: Path) -> None:
    """The curve with its spread over prompts, and the correlation of the residuals of any two steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for branch, curve in (profile.branches or {"default": profile.ratios}).items():
        spread = profile.provenance.get("ratio_std", {}).get(branch, [0.0] * len(curve))
        left.errorbar(range(len(curve)), curve, yerr=spread, marker="o", markersize=3, capsize=2, label=branch)
    left.axhline(1.0, color="gray", linewidth=0.8)
    left.set(title=f"magnitude ratio, {profile.name}", xlabel="step", ylabel="gamma")
    left.legend()
    if profile.gram is not None:
        gram = np.asarray(profile.gram)
        scale = np.sqrt(np.diag(gram))
        shown = right.imshow(gram / np.outer(scale, scale), vmin=0, vmax=1, cmap="viridis")
        figure.colorbar(shown, ax=right)
        right.set(title="correlation of residuals", xlabel="step", ylabel="step")
    figure.savefig(file, dpi=110)
    plt.close(figure)
