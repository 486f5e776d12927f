"""How long work takes on an idle machine: moving averages of what the same work took when it ran alone.

In seconds of the device. Nothing is guessed: what was not measured is not known.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from vllm_omni.kernels.device import DeviceClock, Span

WEIGHT = 0.2
KEPT_SIZES = 64


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
    encode_s: float = 0.0  # work until the first denoiser call
    decode_s: float = 0.0  # and from the last denoiser call's result to the end
    coded_alone: bool = True  # none of that was shared
    step: StepTime = field(default_factory=StepTime)

    def note_coding(self, seconds: float, encoding: bool, alone: bool) -> None:
        """Add work of encoders, or of the decoder; `alone` if nobody shared it."""
        self.coded_alone = self.coded_alone and alone
        if encoding:
            self.encode_s += seconds
        else:
            self.decode_s += seconds

    @property
    def coding_s(self) -> float:
        return self.encode_s + self.decode_s

    @property
    def encode_and_denoise_s(self) -> float:
        return self.denoised - self.started if self.denoised is not None else 0.0


@dataclass(frozen=True)
class StepReport:
    """What a `step` did: one forward of `rows` (0: text encoders or decoders ran) and its seconds.

    `ended` requests got their picture in it; these have spent `coding_s` seconds in encoding and decoding, all in all.
    """

    pixels: int = 0
    rows: int = 0
    skipped: bool = False
    forward_s: float = 0.0
    ended: int = 0
    coding_s: float = 0.0


@dataclass(frozen=True)
class RemainingWork:
    """What a request still needs: rows of a forward that compute, and that skip; exact once its plan is made."""

    request_id: str
    pixels: int
    begun: bool
    cached: bool
    computed: float
    skipped: float


class Pace:
    """Of one runner: `note` after every call of a request, `finish` at its end."""

    def __init__(self) -> None:
        self._sizes: dict[Hashable, SizeClass] = {}

    def known(self, size: Hashable) -> SizeClass | None:
        """What was measured of a size; None unless all of it was."""
        known = self._sizes.get(size, SizeClass())
        return known if known.computed.count and known.skipped.count and known.coding.count else None

    def step_done(
        self,
        clock: DeviceClock,
        size: Hashable,
        times: Timings,
        step: int,
        forward: Span,
        own: Span,
        goes_on: bool,
        alone: bool,
        skipped: bool,
    ) -> None:
        """Note a denoiser call of `step`, as soon as the device has done it, with its request's `own` work after it.

        What comes after the last one is not of the step.
        """

        def note() -> None:
            times.denoised = clock.when(forward[1])
            seconds = clock.seconds(*forward) + (clock.seconds(*own) if goes_on else 0.0)
            self.note(size, times, step, seconds, alone, skipped)

        clock.later(own[1], note)

    def coding_done(
        self,
        clock: DeviceClock,
        size: Hashable,
        times: Timings,
        own: Span,
        joint: Span | float | None,
        sharing: int,
        encoding: bool,
        ends: bool,
    ) -> None:
        """Note work of encoders or of the decoder, as soon as the device has done it; it may end its request.

        `joint` is what `sharing` requests shared; in seconds, if another device has done it.
        """

        def note() -> None:
            shared = clock.seconds(*joint) if isinstance(joint, tuple) else joint or 0.0
            seconds = clock.seconds(*own) + shared / sharing
            times.note_coding(seconds, encoding, sharing == 1)
            if ends and not encoding:
                self.finish(size, times)

        clock.later(own[1], note)

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

    def _close(self, size: Hashable, step: StepTime) -> None:
        if step.step > 0 and step.alone:  # the first step also sets things up
            known = self._of(size)
            (known.skipped if step.skipped else known.computed).note(step.seconds)

    def _of(self, size: Hashable) -> SizeClass:
        known = self._sizes.setdefault(size, SizeClass())
        while len(self._sizes) > KEPT_SIZES:  # sizes are the clients' choice
            del self._sizes[next(iter(self._sizes))]
        return known
