"""Measures what the cache must know of a checkpoint, on prompts that run uncached: its profile, and a chart of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
from vllm_omni.diffusion.cache.profile import CacheProfile, fingerprint
from vllm_omni.diffusion.data import DiffusionCacheConfig

CHECKED_PROMPTS = 4
CHECKED_SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
WORST_DB = 30.0


def calibrate(pipeline: Any, prompts: Sequence[str], name: str, seed: int = 0, **arguments: Any) -> CacheProfile:
    """A profile of `pipeline`'s checkpoint, averaged over `prompts` (seeds count up); `arguments` go to its call.

    Afterwards a few of the prompts run with other seeds, to find which predictor stays nearest to the uncached latents
    at each of some speed-ups, under plans made for it.
    """
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    with _enabled(backend, pipeline):
        for index, prompt in enumerate(tqdm(prompts, desc="calibrate", unit="prompt")):
            _latents(pipeline, prompt, seed + index, arguments)
    assert backend.calibration is not None
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
    errors = compare_predictors(pipeline, profile, prompts[:CHECKED_PROMPTS], seed + len(prompts), arguments)
    best = tuple((float(speedup), min(found, key=found.__getitem__)) for speedup, found in errors.items())
    return profile.model_copy(
        update={"predictors": best, "provenance": profile.provenance | {"predictor_relative_error": errors}}
    )


def compare_predictors(
    pipeline: Any, profile: CacheProfile, prompts: Sequence[str], seed: int, arguments: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """By speed-up and predictor the distance to the uncached latents, relative to their norm, under its own plans.

    The geometric mean over prompts: a decibel counts the same on each.
    """
    exact = [_latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
    errors: dict[str, dict[str, float]] = {}
    for speedup in tqdm(CHECKED_SPEEDUPS, desc="predictors", unit="speed-up"):
        nfe = max(2, round(len(profile.ratios) / speedup))
        for predictor in PREDICTORS:
            with _enabled(
                _cache(profile, nfe=nfe), pipeline, profile.model_copy(update={"predictors": ((1.0, predictor),)})
            ):
                got = [_latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
            away = [max(((a - b).norm() / b.norm()).item(), 1e-9) for a, b in zip(got, exact, strict=True)]
            errors.setdefault(f"{speedup:g}", {})[predictor] = float(f"{exp(sum(map(log, away)) / len(away)):.4g}")
    return errors


def judge(pipeline: Any, profile: CacheProfile, prompts: Sequence[str], seed: int, **arguments: Any) -> CacheProfile:
    """`profile` with `forwards`: the fewest full forwards that are good on `prompts`, which calibration has not seen.

    Good: PSNR to the uncached picture (floats) is at least 30 dB on every prompt, and on average above that of the
    uncached picture with as many steps. The provenance keeps what was measured on the way.
    """
    exact = _pictures(pipeline, prompts, seed, arguments)
    table: dict[str, dict[str, float]] = {}
    chosen = None
    for nfe in range(2, len(profile.ratios) + 1):
        with _enabled(_cache(profile, nfe=nfe), pipeline, profile):
            cached = decibels(_pictures(pipeline, prompts, seed, arguments), exact)
        fewer = decibels(_pictures(pipeline, prompts, seed, arguments | {"num_inference_steps": nfe}), exact)
        table[str(nfe)] = {
            "mean_db": round(float(cached.mean()), 2),
            "worst_db": round(float(cached.min()), 2),
            "fewer_steps_mean_db": round(float(fewer.mean()), 2),
            "fewer_steps_worst_db": round(float(fewer.min()), 2),
        }
        if cached.min() >= WORST_DB and cached.mean() > fewer.mean():
            chosen = nfe
            break
    judged = {"prompts": len(prompts), "prompts_sha256": sha256_of(prompts), "seed": seed, "forwards": table}
    return profile.model_copy(update={"forwards": chosen, "provenance": profile.provenance | {"held_out": judged}})


def decibels(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """PSNR per picture, of pictures from 0 to 1."""
    squared = ((got - exact) ** 2).reshape(len(exact), -1).mean(axis=1)
    return -10 * np.log10(np.maximum(squared, 1e-30))


def sha256_of(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _cache(profile: CacheProfile, **settings: Any) -> MagCacheBackend:
    return MagCacheBackend(DiffusionCacheConfig(mag_ratios=profile.ratios, **settings))


def _pictures(pipeline: Any, prompts: Sequence[str], seed: int, arguments: dict[str, Any]) -> np.ndarray:
    rows = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed + index)
        images = pipeline(prompt, generator=generator, output_type="np", return_dict=False, **arguments)[0]
        rows.append(np.asarray(images[0], dtype=np.float64))
    return np.stack(rows)


@contextmanager
def _enabled(backend: MagCacheBackend, pipeline: Any, profile: CacheProfile | None = None) -> Iterator[None]:
    backend.enable(pipeline)
    backend.profiles = backend.profiles if profile is None else (profile,)
    try:
        yield
    finally:
        backend.disable(pipeline)


def _latents(pipeline: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> torch.Tensor:
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
