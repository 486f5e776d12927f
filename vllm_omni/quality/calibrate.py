"""Measures what the cache must know of a checkpoint, on prompts that run uncached: its profile, and a chart of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from vllm_omni.diffusion.cache.calibration import SKETCH
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile, fingerprint
from vllm_omni.diffusion.cache.settings import CacheSettings
from vllm_omni.diffusion.cache.state import CacheState, PlannedState
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.specs import denoisers_of
from vllm_omni.diffusion.worker.arguments import arguments_of
from vllm_omni.engine.describe import picture_inputs
from vllm_omni.errors import InvalidValueError, NumericalError, OmniError
from vllm_omni.kernels.device import tried
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.made import fill, values
from vllm_omni.trials import GAIN_PROMPTS, Away, Measurement, Trial, asked_steps, figures, gains, refuse_noise
from vllm_omni.tuning import MOST_PROMPTS, tuned_weights

logger = init_logger(__name__)
T = TypeVar("T")


def calibrate(
    pipeline: Any, prompts: Sequence[str], name: str, seed: int = 0, sketch: int = SKETCH, **arguments: Any
) -> CacheProfile:
    """A profile of `pipeline`'s checkpoint: curve, matrix and gains, averaged over `prompts` (seeds count up).

    `arguments` go to the pipeline's call. `judge` adds what its plans are worth. With a sampler that draws noise which
    no seed decides, curve and matrix are all, and a warning says so.
    """
    refuse_more_than_a_prompt(type(pipeline), arguments)
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    assert backend.calibration is not None
    backend.calibration.width = sketch
    scheduler, denoiser = pipeline.scheduler, next(iter(denoisers_of(pipeline).values()))  # the first, of two experts
    with enabled(backend, pipeline):
        for index, prompt in enumerate(tqdm(prompts, desc="curve and matrix", unit="prompt")):
            latents(pipeline, prompt, seed + index, arguments)
    profile = backend.calibration.profile(
        name,
        type(denoiser).__name__,
        fingerprint(denoiser),
        prompts_sha256=sha256_of(prompts),
        scheduler=type(scheduler).__name__,
        scheduler_config={k: v for k, v in scheduler.config.items() if "shift" in k},
        arguments=arguments,
        seed=seed,
        switches=list(backend.calibration.switches),
    )
    few = prompts[:GAIN_PROMPTS]
    measurement = gains(profile, len(few))
    try:
        return measured(measurement, pipeline, few, seed + len(prompts), arguments)
    except InvalidValueError as error:
        if error.field != "scheduler":
            raise
        logger.warning("no gains and no decibels: %s", error)
        return profile


def judge(
    pipeline: Any,
    profile: CacheProfile,
    prompts: Sequence[str],
    held_out: Sequence[str],
    seed: int,
    **arguments: Any,
) -> CacheProfile:
    """`profile` with `budgets`: tuned on `prompts`, and measured on `held_out`, which decided nothing.

    Of prompts that the profile's matrix has seen, a plan looks better than it is: give others, if there are any.
    A profile without gains stays as it is: its runs do not repeat themselves.
    """
    if profile.gains is None:
        return profile
    profile = measured(tuned_weights(profile, len(prompts)), pipeline, prompts, seed + len(held_out), arguments)
    profile = measured(figures(profile, len(held_out)), pipeline, held_out, seed, arguments)
    said = {"prompts": len(held_out), "prompts_sha256": sha256_of(held_out), "seed": seed}
    return profile.model_copy(update={"provenance": profile.provenance | {"held_out": said}})


def unseen(prompts: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """(to measure, to tune on): the last third or 8 of `prompts`; with fewer than three, all for both."""
    count = min(len(prompts) // 3, MOST_PROMPTS)
    return (prompts[:-count], prompts[-count:]) if count else (prompts, prompts)


class _Tried(MagCacheBackend):
    """Runs what a trial says."""

    def __init__(self) -> None:
        super().__init__(DiffusionCacheConfig(mag_ratios=(1.0,)))
        self.trial = Trial(0)
        self.steps = 0  # of the last run that had as many as are asked for

    def state(self, schedule: Schedule, settings: CacheSettings | None = None) -> CacheState:
        plan = self.trial.plan
        if self.trial.steps is None:
            self.steps = schedule.steps
        return CacheState() if plan is None else PlannedState(plan(schedule), self.store, {})


def measured(
    measurement: Measurement[T], pipeline: Any, prompts: Sequence[str], seed: int, arguments: dict[str, Any]
) -> T:
    """Make a measurement's trials on `pipeline`, one after another; the i-th prompt has the seed `seed` + i."""
    backend, results, scheduler = _Tried(), [], type(pipeline.scheduler).__name__  # a watched one has another class
    exact: dict[bool, tuple[int, torch.Tensor]] = {}  # of the last prompt, latents and picture
    draw: dict[bool, Callable[..., torch.Tensor]] = {False: latents, True: picture}
    with enabled(backend, pipeline):
        for trial in tqdm(measurement.trials, desc=measurement.name, unit="run"):
            prompt, run = (prompts[trial.prompt], seed + trial.prompt), draw[trial.picture]
            if exact.get(trial.picture, (None,))[0] != trial.prompt:
                backend.trial = Trial(trial.prompt)
                exact[trial.picture] = trial.prompt, run(pipeline, *prompt, arguments)
            backend.trial, own = trial, {}
            if trial.steps is not None:
                asked = ({"num_inference_steps": usual_steps(type(pipeline))} | arguments)["num_inference_steps"]
                own["num_inference_steps"] = asked_steps(trial.steps, asked, backend.steps)
            reference = exact[trial.picture][1]
            results.append(Away.between(run(pipeline, *prompt, arguments | own), reference, trial.kept))
            refuse_noise(trial, results[-1], scheduler)
    found = measurement.read(results)
    return measured(found, pipeline, prompts, seed, arguments) if isinstance(found, Measurement) else found


def sha256_of(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def cache_of(profile: CacheProfile, **settings: Any) -> MagCacheBackend:
    """A backend for `enabled`, with these settings, on a checkpoint that has this curve."""
    return MagCacheBackend(DiffusionCacheConfig(mag_ratios=profile.ratios, **settings))


@contextmanager
def enabled(backend: MagCacheBackend, pipeline: Any, profile: CacheProfile | None = None) -> Iterator[None]:
    """`backend` on `pipeline`; with `profile` instead of the checkpoint's own."""
    backend.enable(pipeline)
    backend.profiles = backend.profiles if profile is None else (profile,)
    try:
        yield
    finally:
        backend.disable(pipeline)


def refuse_more_than_a_prompt(pipeline: type, arguments: Mapping[str, Any]) -> None:
    """InvalidValueError for a pipeline whose call needs what no line of text says: a picture, above all."""
    needed = {name for name, one in arguments_of(pipeline).items() if one.default is one.empty}
    needed |= {name for name, picture in picture_inputs(pipeline).items() if picture.needed}
    if missing := sorted(needed - {"prompt", *arguments}):
        fix = "beside a prompt; serve it with calibrate='auto' in the cache's settings: that learns from requests"
        raise InvalidValueError("MODEL", pipeline.__name__, f"needs {' and '.join(missing)} {fix}")


def usual_steps(pipeline: type) -> int | None:
    """How many steps a pipeline is asked for if nobody says."""
    steps = arguments_of(pipeline).get("num_inference_steps")
    return steps.default if steps is not None and isinstance(steps.default, int) else None


def latents(pipeline: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> torch.Tensor:
    """The final latents of one run, in fp32."""
    return _made(pipeline, prompt, seed, arguments, "latent").latents.float()


def picture(pipeline: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> torch.Tensor:
    """The decoded output of one run, see `outputs.made.values`."""
    return values(_made(pipeline, prompt, seed, arguments, "np")).double()


def _made(pipeline: Any, prompt: str, seed: int, arguments: dict[str, Any], output_type: str) -> OmniRequestOutput:
    """One run, uncached or as the backend has it. OmniError says what the pipeline raised."""
    generator, output = torch.Generator("cpu").manual_seed(seed), OmniRequestOutput("")
    call = partial(pipeline, prompt=prompt, generator=generator, output_type=output_type, **arguments)
    _, error = tried(lambda: fill(output, call(), output_type == "latent", 0.0, None))
    if isinstance(output.error, NumericalError):  # so far away that there is no number for it
        output.latents, output.images = torch.tensor(torch.nan), [np.nan]
    elif error is not None:
        raise error if isinstance(error, OmniError) else OmniError(f"the pipeline raised {error!r}") from error
    return output


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
