"""What is measured of a checkpoint by trying: gains, and what the plan of each budget is worth.

A measurement is a list of trials, and a function that reads their results. It is pure: whoever can run the model makes
the trials, `vllm-omni calibrate` one after another, an engine whenever nobody else needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from vllm_omni.diffusion.cache.calibration import sketch
from vllm_omni.diffusion.cache.plan.compose import CachePlan, compose, good_plans
from vllm_omni.diffusion.cache.plan.planner import COHERENT, step_weights
from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.schedule import Schedule, forced_steps
from vllm_omni.diffusion.cache.profile import CacheProfile, Forecasted, MeasuredBudget
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, parse
from vllm_omni.errors import InvalidValueError

T = TypeVar("T")
SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.5)
SMOOTH_OVER = 7  # a gain is what a seventh of the run shows
GAINS = 10  # steps of a run at which gains are measured
GAIN_PROMPTS = 4  # on which
SHARE, CONFIDENCE = 0.9, 0.95  # of outputs that keep what a profile promises; with which that is known
LEAST_PAIRS = 5  # that say anything of it: by fewer, some ten decibels less than most keep could be promised
MOST_PAIRS = 5000  # that are counted: 0.9 to their power is a number still
IDENTICAL = 200.0  # dB, beyond what any two pictures differ by that do
SAME = 1e-4  # of the mean square, within which a run that is made twice has ended in the same place
FAR_OFF = 1e6  # times the mean square: how far away something is that holds no numbers


class Trial(NamedTuple):
    """A run of one prompt: as planned, or uncached in so many steps; compared with the uncached run of that prompt.

    With neither it is the uncached run itself; compared, it is made once more, and must not differ.
    """

    prompt: int
    plan: Callable[[Schedule], CachePlan] | None = None
    steps: int | None = None
    picture: bool = False  # decoded output is compared; final latents otherwise
    kept: bool = False  # what it differs by is wanted, not its size alone

    @property
    def uncached(self) -> bool:
        return self.plan is None and self.steps is None


class Away(NamedTuple):
    """How far a trial ended: the mean square of the difference, and of the uncached output (pictures: 0 to 1).

    `moved`, if it was wanted, is a sketch of the difference (see `calibration.sketch`).
    """

    squared: float
    energy: float
    moved: np.ndarray | None = None

    @classmethod
    def of(cls, squared: float, energy: float) -> Away:
        """What holds NaN is far away, but not so far that there is no mean with others."""
        return cls(squared if math.isfinite(squared) else FAR_OFF * max(1.0, energy), energy)  # which may be NaN, too

    @classmethod
    def between(cls, output: torch.Tensor, exact: torch.Tensor, kept: bool) -> Away:
        """From where an uncached run ended to where another did."""
        difference = output - exact
        away = cls.of(difference.pow(2).mean().item(), exact.pow(2).mean().item())
        return away._replace(moved=sketch(difference.float()).cpu().numpy()) if kept else away

    @property
    def gone(self) -> bool:
        """Whether it holds no numbers, or might as well."""
        return self.squared >= FAR_OFF * max(1.0, self.energy)

    @property
    def same(self) -> bool:
        """Whether a run that was made twice ended in the same place, up to rounding."""
        return self.squared <= SAME * self.energy

    @property
    def decibels(self) -> float:
        """PSNR of a picture."""
        return float(-10 * np.log10(max(self.squared, 1e-30)))


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """`trials` in order of their prompts, and what their results say; it may be what else is to be tried."""

    name: str
    trials: tuple[Trial, ...]
    read: Callable[[Sequence[Away]], T | Measurement[T]]


def one_stale(step: int, gap: int, schedule: Schedule, what: Forecasted) -> CachePlan:
    """Every step but one computes: it gets what was made `gap` steps earlier, by the same denoiser, as it was."""
    anchor = anchor_of(step, gap, schedule)
    mask = tuple(other != step or anchor is None for other in range(schedule.steps))
    terms: dict[int, Terms] = {} if anchor is None else {step: ((anchor, 1.0),)}
    return CachePlan.of(mask, terms, what)


def anchor_of(step: int, gap: int, schedule: Schedule) -> int | None:
    """The step whose residual is `gap` old at `step`, of the same denoiser; None at a denoiser's first."""
    begin = next(part.start for part in schedule.segments if part.start <= step < part.stop)
    return max(begin, step - gap) if step > begin else None


def gains(profile: CacheProfile, prompts: int) -> Measurement[CacheProfile]:
    """`profile` with the gain of each step and its standard error over prompts: see `CacheProfile`.

    A run is disturbed at one step, by what was made a tenth of the run earlier, and finished; how far it ends from
    the undisturbed run is divided by the expected size of the disturbance: of a residual, and of an output, if the
    outputs' matrix is known. A few prompts say little of any one step, so that gains are smoothed over a seventh of
    each denoiser's steps. Whatever is on the way counts: the head, guidance, the scheduler, the other steps.
    The first trial is an undisturbed run once more: what that shows, no disturbance has done (see `refuse_noise`).
    """
    assert profile.sigmas is not None and profile.gram is not None
    schedule = profile.schedule
    gap = max(1, round(schedule.steps / GAINS))
    kinds: tuple[Forecasted, ...] = ("residual",) if profile.output_gram is None else ("residual", "output")
    expected = {kind: _stale_errors(profile, kind, gap, schedule) for kind in kinds}

    def stale(step: int, kind: Forecasted) -> Callable[[Schedule], CachePlan]:
        return lambda real: one_stale(step, gap, real, kind)

    def read(results: Sequence[Away]) -> CacheProfile:
        away = np.sqrt([result.squared for result in results[1:]]).reshape(prompts, sum(map(len, expected.values())))
        values: dict[str, np.ndarray] = {}
        for kind, errors in expected.items():
            own, away = away[:, : len(errors)], away[:, len(errors) :]
            smooth, spread = np.ones(schedule.steps), np.zeros(schedule.steps)
            if errors:
                logs = np.log(np.maximum(own / np.array([*errors.values()]), 1e-12))
                if not np.isfinite(logs).all():
                    raise InvalidValueError("gains", "NaN", "cannot be measured: a trial's latents are no numbers")
                smooth, spread = smooth_gains(schedule, [*errors], logs)
            values |= {"gains": smooth, "gain_errors": spread} if kind == "residual" else {"output_gains": smooth}
        digits = {name: tuple(float(f"{v:.6g}") for v in value.tolist()) for name, value in values.items()}
        return profile.model_copy(update=digits)

    every = [(step, kind) for kind, errors in expected.items() for step in errors]
    trials = tuple(Trial(prompt, stale(*one)) for prompt in range(prompts) for one in every)
    return Measurement("gains", (Trial(0), *trials) if trials else (), read)


def asked_steps(nfe: int, asked: int | None, steps: int) -> int:
    """What an uncached run is to be asked for to take `nfe` forwards, if one that was asked for `asked` took `steps`.

    A scheduler of second order takes twice as many as are asked for, an edit with a strength fewer.
    """
    return max(1, round(nfe * (asked or steps) / steps))


def refuse_noise(trial: Trial, away: Away, scheduler: str) -> None:
    """InvalidValueError if an uncached run does not repeat itself: trials would differ by the sampler's noise."""
    if trial.uncached and not away.same:
        fix = "draws noise that no seed decides, so that no two runs can be compared: only a matrix is learnt"
        raise InvalidValueError("scheduler", scheduler, fix)


def _stale_errors(profile: CacheProfile, what: Forecasted, gap: int, schedule: Schedule) -> dict[int, float]:
    """By step, how far the latents are expected to be moved if it gets what was made `gap` steps earlier."""
    gram, weights = np.asarray(profile.gram_of(what)), step_weights(schedule.sigmas)
    expected: dict[int, float] = {}
    for step in sorted({*range(1, schedule.steps, gap), schedule.steps - 1} - {0}):
        if (anchor := anchor_of(step, gap, schedule)) is not None:
            squared = gram[anchor, anchor] + gram[step, step] - 2 * gram[anchor, step]
            error = float(np.sqrt(max(squared, 0.0))) * weights[step]
            expected |= {step: error} if error > 0 else {}
    return expected


def smooth_gains(schedule: Schedule, measured: Sequence[int], logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(gain, its standard error over prompts) of every step; `logs` (prompts, measured) of the gains at those steps.

    A local line through the logarithms (Cleveland 1979), per denoiser: what few prompts show of one step is mostly
    noise, and on the judges plans from smooth gains rank better (docs/log.md).
    """
    every, found = np.arange(schedule.steps), np.asarray(measured)
    middle, spread = logs.mean(axis=0), logs.std(axis=0) / np.sqrt(len(logs))
    line = np.interp(every, found, middle)
    for part in schedule.segments:
        own = (found >= part.start) & (found < part.stop)
        if own.sum() > 1:
            width = max(1.0, (part.stop - part.start) / SMOOTH_OVER)
            line[part] = [_local_line(found[own], middle[own], step, width) for step in every[part]]
    # The level is that of the root mean square, which the prompts that are disturbed most lead.
    gains = np.exp(line) * np.sqrt(np.exp(2 * (logs - line[found])).mean())
    return gains, gains * np.interp(every, found, spread)


def _local_line(places: np.ndarray, values: np.ndarray, at: int, width: float) -> float:
    """The value at `at` of the line through the points, weighted by a Gaussian of `width` around it."""
    root = np.exp(-(((places - at) / width) ** 2) / 4)
    design = np.stack([root, root * (places - at)], axis=1)
    return float(np.linalg.lstsq(design, root * values, rcond=None)[0][0])


def kept_by_most(decibels: Sequence[float]) -> float | None:
    """The dB that nine of ten outputs like these keep, known with a confidence of 0.95; None if fewer than five say it.

    From 29 on the r-th lowest of these, where r or more are of the worst tenth with that confidence (Wilks 1941, of any
    distribution). Of fewer the tolerance limit of a normal distribution (Natrella, Experimental Statistics, 1963,
    2-1.4) by those that differ at all, or the lowest if that is less.
    """
    count, rank, at_most = min(len(decibels), MOST_PAIRS), 0, 0.0
    exactly = SHARE**count
    while (at_most := at_most + exactly) <= 1 - CONFIDENCE:  # probability that `rank` or fewer are
        exactly *= (count - rank) / (rank + 1) * (1 - SHARE) / SHARE
        rank += 1
    if rank:
        return round(sorted(decibels)[rank - 1], 2)
    if count < LEAST_PAIRS:
        return None
    differ = [value for value in decibels if value < IDENTICAL]
    if (count := len(differ)) < 2:
        return round(min(decibels), 2)
    most, sure = NormalDist().inv_cdf(SHARE), NormalDist().inv_cdf(CONFIDENCE)
    a, b = 1 - sure**2 / (2 * (count - 1)), most**2 - sure**2 / count
    factor = (most + math.sqrt(most**2 - a * b)) / a
    return round(min(*decibels, float(np.mean(differ) - factor * np.std(differ, ddof=1))), 2)


def figures(profile: CacheProfile, prompts: int, first: int = 0) -> Measurement[CacheProfile]:
    """`profile` with the decibels of each of its budgets, on prompts that decided nothing: see `MeasuredBudget`."""
    steps, curve_only, bare = len(profile.ratios), profile.curve_alone(), profile.model_copy(update={"budgets": ()})

    def of(prompt: int, budget: MeasuredBudget) -> dict[str, Trial]:
        nfe = budget.forwards(steps)
        trials = {"psnr": Trial(prompt, planned(profile, nfe), picture=True)}
        if budget.terms:
            trials["untuned_psnr"] = Trial(prompt, planned(bare, nfe), picture=True)
        trials["rule_psnr"] = Trial(prompt, planned(curve_only, nfe), picture=True)
        return trials | {"fewer_steps_psnr": Trial(prompt, None, nfe, picture=True)}

    every = [
        (budget.speedup, name, trial)
        for prompt in range(first, first + prompts)
        for budget in profile.budgets
        for name, trial in of(prompt, budget).items()
    ]

    def read(results: Sequence[Away]) -> CacheProfile:
        values: dict[float, dict[str, list[float]]] = {}
        for (speedup, name, _), result in zip(every, results, strict=True):
            values.setdefault(speedup, {}).setdefault(name, []).append(result.decibels)
        measured = []
        for budget in profile.budgets:
            own = values[budget.speedup]
            kept = {name: kept_by_most(decibels) for name, decibels in own.items()}
            mean, fewer = (round(float(np.mean(own[name])), 2) for name in ("psnr", "fewer_steps_psnr"))
            said = {"psnr_mean": mean, "pairs": prompts, "fewer_steps_are_nearer": fewer > mean}
            measured.append(budget.model_copy(update=kept | said))
        return profile.model_copy(update={"budgets": tuple(measured)})

    return Measurement("held-out prompts", tuple(trial for *_, trial in every), read)


def plans(profile: CacheProfile) -> Iterator[list[CachePlan]]:
    """The planner's own plan of each number of full forwards that is measured, and what may be as good.

    By ascending speed-up, one number after another: each takes a moment to find, and is remembered.
    """
    schedule, bare = profile.schedule, profile.model_copy(update={"budgets": ()})
    least = len(forced_steps(schedule.steps, True, schedule.switches))
    numbers = {max(least, round(schedule.steps / speedup)) for speedup in SPEEDUPS} - {schedule.steps}
    for nfe in sorted(numbers, reverse=True):
        own = planned(bare, nfe)(schedule)
        masks = good_plans(nfe, bare, profile.forecasts, schedule, True)[1:] if own.predictor == COHERENT else ()
        settings = (parse("magcache", DiffusionCacheConfig(steps_mask=mask)) for mask in masks)
        yield [own, *(compose(one, bare.ratios, bare, schedule) for one in settings)]


def planned(profile: CacheProfile, nfe: int) -> Callable[[Schedule], CachePlan]:
    """What a request with so many full forwards would do, by this profile."""
    settings = parse("magcache", DiffusionCacheConfig(nfe=nfe))
    return lambda schedule: compose(settings, profile.ratios, profile, schedule)
