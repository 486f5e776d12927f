"""How long a request takes on an idle machine: moving averages of what the same work took when it ran alone.

A budget in seconds becomes a number of full forwards here, when the request's size and schedule are known. Nothing is
guessed: a size of which nothing has been measured is refused.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_omni.diffusion.cache.plan.schedule import Schedule, forced_steps
from vllm_omni.diffusion.cache.settings import Budget, CacheSettings
from vllm_omni.diffusion.denoiser.specs import latents_of
from vllm_omni.errors import InvalidValueError

WEIGHT = 0.2
KEPT_SIZES = 64
TIMED_STEPS = 16


@dataclass
class Average:
    """An exponential moving average in seconds, that begins as the plain mean."""

    seconds: float = 0.0
    count: int = 0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.seconds += max(WEIGHT, 1 / self.count) * (seconds - self.seconds)


@dataclass
class SizeClass:
    """Requests of one kind: the same denoiser, latents and guidance."""

    computed: Average = field(default_factory=Average)  # a step whose blocks ran, with all that belongs to it
    skipped: Average = field(default_factory=Average)
    coding: Average = field(default_factory=Average)  # encoding and decoding


@dataclass
class StepTime:
    """A step of one request: its seconds, and whether it ran alone and without its blocks."""

    step: int = -1
    seconds: float = 0.0
    alone: bool = True
    skipped: bool = True


@dataclass
class Timings:
    """One request's own times, in seconds; of work that was shared, its share."""

    started: float = field(default_factory=time.perf_counter)
    denoised: float | None = None  # when its last denoiser call ended
    ended: float | None = None
    encode_s: float = 0.0  # work until the first denoiser call
    decode_s: float = 0.0  # and from the last denoiser call's result to the end
    coded_alone: bool = True  # none of that was shared
    step: StepTime = field(default_factory=StepTime)

    @property
    def coding_s(self) -> float:
        return self.encode_s + self.decode_s

    @property
    def encode_and_denoise_s(self) -> float:
        return self.denoised - self.started if self.denoised is not None else 0.0


class Pace:
    """Of one runner. `note` after every call of a request, `finish` at its end, `settle` before its plan is made."""

    def __init__(self) -> None:
        self._sizes: dict[Hashable, SizeClass] = {}

    def times(self, size: Hashable, skipped: bool) -> bool:
        """Whether the coming step of a request that is alone is to be timed.

        An accelerator must be waited for to show its work, so there only the first steps of a size are.
        """
        known = self._sizes.get(size, SizeClass())
        return not torch.cuda.is_available() or (known.skipped if skipped else known.computed).count < TIMED_STEPS

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def note(self, size: Hashable, times: Timings, step: int, seconds: float, alone: bool, skipped: bool) -> None:
        """A denoiser call of `step` that took `seconds` until the request parked again; branches of a step add up."""
        if step != times.step.step:
            self._close(size, times.step)
            times.step = StepTime(step)
        times.step.seconds += seconds
        times.step.alone = times.step.alone and alone
        times.step.skipped = times.step.skipped and skipped

    def finish(self, size: Hashable, times: Timings) -> None:
        """The end of a request that has its picture."""
        self._close(size, times.step)
        if times.coded_alone:
            self._of(size).coding.note(times.coding_s)

    def settle(self, settings: CacheSettings, size: Hashable, schedule: Schedule) -> CacheSettings:
        """The settings with the most full forwards that a budget of seconds allows, `nfe`.

        InvalidValueError if nothing of this size has been measured, or if even the fewest forwards take longer.
        """
        budget = settings.plan
        if not isinstance(budget, Budget) or budget.seconds is None:
            return settings
        known = self._sizes.get(size, SizeClass())
        if not (known.computed.count and known.skipped.count and known.coding.count):
            raise InvalidValueError(
                "seconds", budget.seconds, "needs a request of this size that ran alone with a cache before it"
            )
        left = budget.seconds - known.coding.seconds - schedule.steps * known.skipped.seconds
        each = max(known.computed.seconds - known.skipped.seconds, 1e-9)
        least = len(forced_steps(schedule.steps, settings.config.compute_last_step, schedule.switches))
        if (nfe := min(int(left / each), schedule.steps)) < least:
            nearest = budget.seconds - left + least * each
            steps = f"{schedule.steps} steps of this size"
            fix = f"is out of reach for {steps} (nearest: {nearest:.3g}, {least} full forwards)"
            raise InvalidValueError("seconds", budget.seconds, fix)
        return settings._replace(plan=Budget(nfe=nfe, seconds=budget.seconds))

    def _close(self, size: Hashable, step: StepTime) -> None:
        if step.step > 0 and step.alone:  # the first step also sets things up
            known = self._of(size)
            (known.skipped if step.skipped else known.computed).note(step.seconds)

    def _of(self, size: Hashable) -> SizeClass:
        known = self._sizes.setdefault(size, SizeClass())
        while len(self._sizes) > KEPT_SIZES:  # sizes are the clients' choice
            del self._sizes[next(iter(self._sizes))]
        return known


def size_of(denoiser: str, arguments: Mapping[str, Any], asked: Mapping[str, Any]) -> Hashable:
    """What makes two requests take equally long per step: the denoiser, its latents' shape, and guided or not."""
    hidden = latents_of(arguments)
    shapes = tuple(tuple(latents.shape) for latents in (hidden if isinstance(hidden, list) else [hidden]))
    guided = [float(asked.get(name) or 1) > 1 for name in ("guidance_scale", "true_cfg_scale")]
    return denoiser, shapes, *guided, asked.get("negative_prompt") is None
