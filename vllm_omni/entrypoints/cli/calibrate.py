"""`vllm-omni calibrate`: run some prompts uncached and write what the cache needs to know of this checkpoint."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.predictor import PREDICTORS
from vllm_omni.diffusion.cache.profile import CacheProfile, fingerprint
from vllm_omni.diffusion.data import DiffusionCacheConfig, OmniDiffusionConfig
from vllm_omni.diffusion.loader import generation_defaults, load_pipeline
from vllm_omni.entrypoints.cli.generate import parse_size
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import check_text

CHECKED_PROMPTS = 4


def calibrate(pipeline: Any, prompts: Sequence[str], name: str, seed: int = 0, **arguments: Any) -> CacheProfile:
    """A profile of `pipeline`'s checkpoint, averaged over `prompts` (seeds count up); `arguments` go to its call.

    Afterwards a few of the prompts run with other seeds, to find which predictor stays nearest to the uncached latents
    under the default plan.
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
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        scheduler=type(scheduler).__name__,
        scheduler_config={k: v for k, v in scheduler.config.items() if "shift" in k},
        arguments=arguments,
        seed=seed,
    )
    errors = compare_predictors(pipeline, profile, prompts[:CHECKED_PROMPTS], seed + len(prompts), arguments)
    best = min(errors, key=lambda predictor: errors[predictor])
    return profile.model_copy(
        update={"predictor": best, "provenance": profile.provenance | {"predictor_relative_error": errors}}
    )


def compare_predictors(
    pipeline: Any, profile: CacheProfile, prompts: Sequence[str], seed: int, arguments: dict[str, Any]
) -> dict[str, float]:
    """Each predictor's mean distance to the uncached latents, relative to their norm, under the default plan."""
    exact = [_latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
    errors = {}
    for predictor in PREDICTORS:
        backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=profile.ratios))
        with _enabled(backend, pipeline, profile.model_copy(update={"predictor": predictor})):  # what `auto` then takes
            got = [_latents(pipeline, prompt, seed + i, arguments) for i, prompt in enumerate(prompts)]
        away = [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
        errors[predictor] = round(sum(away) / len(away), 6)
    return errors


@contextmanager
def _enabled(backend: MagCacheBackend, pipeline: Any, profile: CacheProfile | None = None) -> Iterator[None]:
    backend.enable(pipeline)
    backend.profile = profile or backend.profile
    try:
        yield
    finally:
        backend.disable(pipeline)


def _latents(pipeline: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(prompt, generator=generator, output_type="latent", return_dict=False, **arguments)[0].float()


def read_prompts(file: Path, limit: int) -> list[str]:
    """At most `limit` of the file's lines, evenly spread."""
    if not file.is_file():
        raise InvalidValueError("--prompts", str(file), "must be a text file with one prompt a line")
    lines = [check_text("--prompts", line.strip()) for line in file.read_text().splitlines() if line.strip()]
    if not lines or limit < 1:
        raise InvalidValueError("--prompts", str(file), "must hold at least one prompt")
    count = min(limit, len(lines))
    return [lines[index * len(lines) // count] for index in range(count)]


def run(args: argparse.Namespace) -> int:
    """Write the profile and its chart."""
    prompts = read_prompts(Path(args.prompts), args.limit)
    width, height = parse_size(args.size)
    asked = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "width": width,
        "height": height,
    }
    arguments = generation_defaults(args.model) | {k: v for k, v in asked.items() if v is not None}
    pipeline = load_pipeline(
        OmniDiffusionConfig(
            model=args.model, dtype=args.dtype, device=args.device, enable_cpu_offload=args.enable_cpu_offload
        )
    )
    profile = calibrate(pipeline, prompts, args.name or Path(args.model).name, args.seed, **arguments)
    out = Path(args.out)
    profile.save(out)
    draw(profile, out.with_suffix(".png"))
    print(f"{'step':>4} {'sigma':>7} {'gamma':>8}")
    for step, (sigma, ratio) in enumerate(zip(profile.sigmas or (), profile.ratios, strict=True)):
        print(f"{step:4} {sigma:7.4f} {ratio:8.5f}")
    print(f"{out}: {len(prompts)} prompts, {len(profile.ratios)} steps; best predictor: {profile.predictor}")
    print(f"chart: {out.with_suffix('.png')}")
    return 0


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
