"""A checkpoint without a profile gets one from the requests that it serves: of each schedule that they really have.

Where nothing is known, the first requests run uncached, and are measured. Where a curve is known they are cached by it;
what a few of them had in common, steps and size, is noted, and a few runs of that kind are measured when nobody waits.
Nothing of a request is kept but these numbers, and sums of products of its residuals' sketches. What needs more runs
(gains, tuned weights and decibels) is for whoever has time to spare: `unfinished` says which profiles
lack it; `chosen` which of them holds for a schedule. Makes no run itself.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vllm_omni.diffusion.cache.calibration import Calibration, RecordingState
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import LEARNT, CacheProfile, load_profile
from vllm_omni.envs import profile_folder
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import RENAMED
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

MOST_SCHEDULES = 8  # under way at a time: requests may bring noise levels of their own
LEAST_STEPS = 4  # of a schedule with something to leave out
REQUESTS = 4  # that a profile is made from; how many more would change its plans is not measured
MOST_RUNS = 2 * REQUESTS  # for one schedule: one that a run does not meet is left alone
FAR = 1.5  # times as many steps as were measured
LOUDER = 3.0  # times the highest noise level that was measured: a schedule of other units, 157 where that was 1
RECENT_S = 600.0  # since a request had a schedule that is said to be learnt
NUMBERS = (  # that a request and a run like it have in common; none of them is what a picture shows
    *("num_inference_steps", "height", "width", "strength", "frame_rate", "fps", "max_sequence_length"),
    *("guidance_scale", "guidance_scale_2", "true_cfg_scale"),
)


@dataclass
class Course:
    """One schedule that is being learnt: what was measured of it, and how much it is asked for."""

    asked: Mapping[str, Any]  # what the first request that had it was like, see `likeness`
    calibration: Calibration = field(default_factory=Calibration)
    cached: int = 0  # requests that were cached meanwhile, by a curve
    runs: int = 0  # made for its sake
    seen: float = 0.0  # when a request last had it, of the monotonic clock

    @property
    def progress(self) -> tuple[int, int]:
        return self.calibration.requests, self.cached

    @property
    def wants_runs(self) -> bool:
        return self.cached >= REQUESTS and self.runs < MOST_RUNS

    @property
    def barren(self) -> bool:
        """Whether its requests have shown nothing: no blocks of theirs can be looked into."""
        return not self.calibration.requests and self.calibration.fruitless >= REQUESTS

    @property
    def waits(self) -> bool:
        """Whether it is for requests to teach more of it, and they come."""
        return not self.cached and not self.barren and time.monotonic() - self.seen < RECENT_S


class Learning:
    """Measures requests, or runs in their place, and makes a profile of a schedule once there are enough of them."""

    def __init__(self, transformer_class: str, fingerprint: str, model_name: str) -> None:
        self._class, self._fingerprint, self._model_name = transformer_class, fingerprint, model_name
        self._under_way: dict[Schedule, Course] = {}
        self.over = False  # what needs runs is not going to come
        self.left: set[CacheProfile] = set()  # nor is it for these, which stay as they are

    def state(self, schedule: Schedule, asked: Mapping[str, Any]) -> RecordingState | None:
        """The state of a request that computes every step, and is measured; None where that has shown nothing."""
        if not self._under_way:
            logger.info("magcache: no profile of this checkpoint; one is learnt from %d requests", REQUESTS)
        course = self._course(schedule, asked)
        return None if course.barren else course.calibration.state(schedule)

    def note(self, schedule: Schedule, asked: Mapping[str, Any]) -> None:
        """Take note of a request that is cached by a curve: if many are like it, they are worth a matrix."""
        self._course(schedule, asked).cached += 1

    def _course(self, schedule: Schedule, asked: Mapping[str, Any]) -> Course:
        """If there are too many, the one that is least advanced goes, the oldest of equals."""
        if schedule not in self._under_way:
            if len(self._under_way) == MOST_SCHEDULES:
                del self._under_way[min(self._under_way, key=lambda other: self._under_way[other].progress)]
            self._under_way[schedule] = Course(dict(asked))
        self._under_way[schedule].seen = time.monotonic()
        return self._under_way[schedule]

    def to_run(self) -> tuple[Schedule, Course] | None:
        """A schedule of which a run is wanted, if there is any."""
        return next(((schedule, course) for schedule, course in self._under_way.items() if course.wants_runs), None)

    def state_of_run(self, wanted: Schedule, schedule: Schedule) -> RecordingState | None:
        """The state of a run that was begun for the schedule `wanted`. One that has another says nothing of it."""
        course = self._under_way.get(wanted)
        if course is None or schedule == wanted:
            return None if course is None else course.calibration.state(schedule)
        course.runs = MOST_RUNS
        logger.info("magcache: %d steps as requests have them are not met by runs of its own", wanted.steps)
        return None

    def ready(self) -> list[CacheProfile]:
        """The profiles that can be made by now, each once; they are written where the next start finds them."""
        done = [schedule for schedule, course in self._under_way.items() if course.calibration.requests >= REQUESTS]
        profiles = []
        for schedule in done:
            course, name = self._under_way[schedule], self._name_of(schedule)
            try:
                profile = course.calibration.profile(name, self._class, self._fingerprint)
            except InvalidValueError as error:
                logger.warning("magcache: what was measured of %s makes no profile: %s", name, error)
                course.calibration, course.runs = Calibration(), MOST_RUNS
                continue
            del self._under_way[schedule]
            more = {"kind": LEARNT, "switches": list(schedule.switches), "asked": dict(course.asked)}
            profiles.append(profile.model_copy(update={"provenance": profile.provenance | more}))
            logger.info("magcache: learnt %s; requests are cached with it from now on", name)
            keep(profiles[-1])
        return profiles

    def unfinished(self, profiles: Sequence[CacheProfile]) -> CacheProfile | None:
        """The first of a checkpoint's profiles that runs of its own would give more, None if there is none.

        One that a calibrated profile of as many steps comes before is never planned with.
        """
        calibrated = {len(one.ratios) for one in profiles if one.gram is not None and not is_learnt(one)}
        open_ones = (one for one in profiles if unfinished(one) and one not in self.left)
        return next((one for one in open_ones if len(one.ratios) not in calibrated), None)

    def _name_of(self, schedule: Schedule) -> str:
        """Of the model, the steps and their noise levels: several of as many steps lie in one folder."""
        levels = repr(([round(sigma, 6) for sigma in schedule.sigmas], schedule.switches))
        digest = hashlib.sha256(levels.encode()).hexdigest()[:6]
        return f"{self._model_name.rpartition('/')[2] or self._class}-{schedule.steps}-{digest}"[-200:]

    @property
    def progress(self) -> str:
        """What is being learnt, in words; "" if nothing is."""
        parts = []
        for schedule, course in self._under_way.items():
            if course.waits or (course.wants_runs and not self.over):
                kind = "requests" if course.waits else "runs"
                parts.append(f"{course.calibration.requests} of {REQUESTS} {kind} of {schedule.steps} steps")
        return ", ".join(parts)


def likeness(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must be asked to be like a request with these arguments: numbers and sizes, nobody's content."""
    asked: dict[str, Any] = {name: arguments[name] for name in NUMBERS if isinstance(arguments.get(name), int | float)}
    asked.setdefault("num_inference_steps", None)  # the pipeline's own
    for ours in ("num_frames", "seconds"):
        for value in map(arguments.get, RENAMED[ours]):
            if isinstance(value, int | float):
                asked[ours] = value
    if any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")):
        asked["negative_prompt"] = " "
    pictures = {name: size for name, value in arguments.items() if (size := _sizes(value))}
    return asked | ({"pictures": pictures} if pictures else {})


def _sizes(value: Any) -> list[Any] | None:
    """Of a picture its size, of several the size of each; None of anything else."""
    if isinstance(value, list | tuple):
        sizes = [_sizes(one) if isinstance(one, Image.Image) else None for one in value]
        return sizes if all(sizes) else None
    return [*value.size] if isinstance(value, Image.Image) else None


def keep(profile: CacheProfile) -> None:
    """Write a learnt profile, unless another process has one that lacks less.

    One that cannot be written lasts as long as the process.
    """
    path = profile_folder() / f"{profile.name}-{profile.fingerprint}-{len(profile.ratios)}.json"
    try:
        with suppress(InvalidValueError):
            there = load_profile(path) if path.exists() else profile
            if len(there.lacks) < len(profile.lacks) or (there.has_figures and not profile.has_figures):
                return
        profile.save(path)
    except OSError as error:
        logger.warning("the learnt profile %s cannot be kept: %s", profile.name, error)


def unfinished(profile: CacheProfile) -> bool:
    """Whether a profile was learnt, and still lacks something that runs of its own would give."""
    return is_learnt(profile) and len(profile.ratios) >= LEAST_STEPS and bool(profile.lacks)


def is_learnt(profile: CacheProfile) -> bool:
    return profile.provenance.get("kind") == LEARNT


def replaced(profiles: Sequence[CacheProfile], profile: CacheProfile) -> tuple[CacheProfile, ...]:
    """`profiles` with `profile` where it was before it had more to it; another may have its name."""

    def key(one: CacheProfile) -> tuple[Any, ...]:
        return one.name, one.fingerprint, len(one.ratios), is_learnt(one)

    return tuple(profile if key(one) == key(profile) else one for one in profiles)


def covers(profile: CacheProfile, schedule: Schedule) -> bool:
    """Whether a profile says something of a schedule; one that was learnt does so of those like its own alone.

    That is about as many steps, the same switches, and no three noise levels between two measured ones, or two beyond
    the last: their residuals would lie on one line, and forecasting one from the others would seem to cost nothing.
    A schedule without `sigmas` is judged by its steps. None says anything of noise far above all that was measured:
    those are levels of another kind of schedule.
    """
    measured, wanted = len(profile.ratios), schedule.steps
    if profile.sigmas and schedule.sigmas and max(schedule.sigmas) > LOUDER * max(profile.sigmas):
        return False
    if not is_learnt(profile):
        return True
    if max(measured, wanted) > FAR * min(measured, wanted):
        return False
    if profile.sigmas is None or not schedule.sigmas:
        return profile.sigmas is not None
    if profile.schedule.switches != schedule.switches:
        return False
    if profile.is_of(schedule):
        return True
    known = np.unique(profile.sigmas)
    if len(known) < 2:
        return False
    ends = 2 * known[0] - known[1], 2 * known[-1] - known[-2]
    levels = np.sort(schedule.sigmas)
    places = np.interp(levels, [ends[0], *known, ends[1]], np.arange(-1, len(known) + 1)).round(3)
    inside = places[0] > -1 and places[-1] < len(known) and places[1] > 0 and places[-2] < len(known) - 1
    return bool(inside and (np.ceil(places[2:]) - np.floor(places[:-2]) > 1).all())


def nearest(profiles: Sequence[CacheProfile], steps: int) -> CacheProfile | None:
    """The one measured at the step count nearest to `steps`, in ratio; the first of equals. None: there is none."""
    return min(profiles, key=lambda p: abs(math.log(len(p.ratios) / steps)), default=None)


def chosen(profiles: Sequence[CacheProfile], schedule: Schedule) -> CacheProfile | None:
    """The one to plan a schedule with: the nearest of those that cover it, of those with a matrix if there are any.

    Of those of as many steps one that was calibrated, on purpose, comes before one that was learnt by the way.
    If there are only some that do not, it is the curve of the nearest, which the published rule can do with.
    """

    def away(profile: CacheProfile) -> tuple[float, bool, float]:
        sigmas = profile.sigmas or ()
        same = len(sigmas) == len(schedule.sigmas) > 0
        apart = float(np.abs(np.subtract(sigmas, schedule.sigmas)).mean().round(4)) if same else 0.0
        return abs(math.log(len(profile.ratios) / schedule.steps)), is_learnt(profile), apart

    fitting = [profile for profile in profiles if covers(profile, schedule)]
    fitting = [profile for profile in fitting if profile.gram is not None] or fitting
    if fitting or not profiles:
        return min(fitting, key=away, default=None)
    return _curve_of(min(profiles, key=away))


@lru_cache(maxsize=32)
def _curve_of(profile: CacheProfile) -> CacheProfile:
    return profile.curve_alone()
