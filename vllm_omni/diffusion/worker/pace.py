"""How long a request takes on an idle machine: moving averages of what the same work took when it ran alone.

A promise in seconds becomes a number of full forwards here, when the request's size and schedule are known. Nothing is
guessed: a size of which nothing has been measured is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_omni.diffusion.cache.segments import Switches, forced_steps
from vllm_omni.diffusion.data import DiffusionCacheConfig
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
class Size:
    """Requests of one kind: the same denoiser, latents and guidance."""

    computed: Average = field(default_factory=Average)  # a step whose blocks ran, with all that belongs to it
    skipped: Average = field(default_factory=Average)
    ends: Average = field(default_factory=Average)  # encoding and decoding


@dataclass
class Stopwatch:
    """One request's own times; a step that it shared with other requests is not noted."""

    step: int = -1
    seconds: float = 0.0
    alone: bool = True
    skipped: bool = False
    ends: float = 0.0  # encoding and decoding
    ends_alone: bool = True


class Pace:
    """Of one runner. `note` after every call of a request, `finish` at its end, `settle` before its plan is made."""

    def __init__(self) -> None:
        self._sizes: dict[Hashable, Size] = {}

    def times(self, size: Hashable, skipped: bool) -> bool:
        """Whether the coming step of a request that is alone is to be timed.

        An accelerator must be waited for to show its work, so there only the first steps of a size are.
        """
        kind = self._sizes.get(size, Size())
        return not torch.cuda.is_available() or (kind.skipped if skipped else kind.computed).count < TIMED_STEPS

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def note(self, size: Hashable, watch: Stopwatch, step: int, seconds: float, alone: bool, skipped: bool) -> None:
        """A denoiser call of `step` that took `seconds` until the request parked again; branches of a step add up."""
        if step != watch.step:
            self._close(size, watch)
            watch.step, watch.seconds, watch.alone, watch.skipped = step, 0.0, True, skipped
        watch.seconds += seconds
        watch.alone = watch.alone and alone
        watch.skipped = watch.skipped and skipped

    def finish(self, size: Hashable, watch: Stopwatch) -> None:
        self._close(size, watch)
        if watch.ends_alone:
            self._of(size).ends.note(watch.ends)

    def settle(
        self, config: DiffusionCacheConfig, size: Hashable, steps: int, switches: Switches = ()
    ) -> DiffusionCacheConfig:
        """`config` with the most full forwards that its `seconds` allow, `nfe`.

        InvalidValueError where nothing of this size has been measured, or where even the fewest forwards take longer.
        """
        if config.seconds is None:
            return config
        known = self._sizes.get(size, Size())
        if not (known.computed.count and known.skipped.count and known.ends.count):
            raise InvalidValueError(
                "seconds", config.seconds, "needs a request of this size that ran alone with a cache before it"
            )
        left = config.seconds - known.ends.seconds - steps * known.skipped.seconds
        each = max(known.computed.seconds - known.skipped.seconds, 1e-9)
        least = len(forced_steps(steps, config.compute_last_step, switches))
        if (nfe := min(int(left / each), steps)) < least:
            nearest = config.seconds - left + least * each
            fix = f"is out of reach for {steps} steps of this size (nearest: {nearest:.3g}, {least} full forwards)"
            raise InvalidValueError("seconds", config.seconds, fix)
        return config.model_copy(update={"nfe": nfe})

    def expected(self, size: Hashable, computed: int, skipped: int) -> float | None:
        """Seconds of a request alone; None where nothing was measured."""
        if (known := self._sizes.get(size)) is None:
            return None
        return known.ends.seconds + computed * known.computed.seconds + skipped * known.skipped.seconds

    def _close(self, size: Hashable, watch: Stopwatch) -> None:
        if watch.step > 0 and watch.alone:  # the first step also sets things up
            kind = self._of(size)
            (kind.skipped if watch.skipped else kind.computed).note(watch.seconds)

    def _of(self, size: Hashable) -> Size:
        known = self._sizes.setdefault(size, Size())
        while len(self._sizes) > KEPT_SIZES:  # sizes are the clients' choice
            del self._sizes[next(iter(self._sizes))]
        return known


def size_of(denoiser: str, arguments: Mapping[str, Any], asked: Mapping[str, Any]) -> Hashable:
    """What makes two requests take equally long per step: the denoiser, its latents' shape, and guided or not."""
    hidden = arguments.get("hidden_states", next(iter(arguments.values())))
    shapes = tuple(tuple(latents.shape) for latents in (hidden if isinstance(hidden, list) else [hidden]))
    guided = [float(asked.get(name) or 1) > 1 for name in ("guidance_scale", "true_cfg_scale")]
    return denoiser, shapes, *guided, asked.get("negative_prompt") is None
