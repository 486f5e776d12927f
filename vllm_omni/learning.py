"""A checkpoint without a profile gets one from the requests that it serves: of each schedule that they really have.

Where nothing is known, the first requests run uncached, and are measured. Where a curve is known they are cached by it;
what a few of them had in common, steps and size, is noted, and a few runs of that kind are measured when nobody waits.
Nothing of a request is kept but these numbers, and sums of products of its residuals' sketches. What needs more runs
(gains, the choice for each budget and its decibels) is for whoever has time to spare: `unfinished` says which profiles
lack it; `chosen` which of them holds for a schedule. Makes no run itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from vllm_omni.diffusion.cache.calibration import Calibration, RecordingState
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import LEARNT, CacheProfile, load_profile
from vllm_omni.envs import profile_folder
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

MOST_SCHEDULES = 8  # under way at a time: requests may bring noise levels of their own
LEAST_STEPS = 4  # of a schedule with something to leave out
REQUESTS = 4  # that a profile is made from; how many more would change its plans is not measured
MOST_RUNS = 2 * REQUESTS  # for one schedule: one that a run does not meet is left alone
FAR = 1.5  # times as many steps as were measured


@dataclass
class Course:
    """One schedule that is being learnt: what was measured of it, and how much it is asked for."""

    size: Mapping[str, int]  # of the first request that had it: height, width, frames, as far as it said
    calibration: Calibration = field(default_factory=Calibration)
    cached: int = 0  # requests that were cached meanwhile, by a curve
    runs: int = 0  # begun for its sake

    @property
    def progress(self) -> tuple[int, int]:
        return self.calibration.requests, self.cached

    @property
    def wants_runs(self) -> bool:
        return self.cached >= REQUESTS and self.runs < MOST_RUNS


class Learning:
    """Measures requests, or runs in their place, and makes a profile of a schedule once there are enough of them."""

    def __init__(self, transformer_class: str, fingerprint: str, model_name: str) -> None:
        self._class, self._fingerprint, self._model_name = transformer_class, fingerprint, model_name
        self._under_way: dict[Schedule, Course] = {}
        self.over = False  # what needs runs is not going to come

    def state(self, schedule: Schedule, size: Mapping[str, int]) -> RecordingState:
        """The state of a request that computes every step, and is measured."""
        if not self._under_way:
            logger.info("magcache: no profile of this checkpoint; one is learnt from %d requests", REQUESTS)
        return self._course(schedule, size).calibration.state(schedule)

    def note(self, schedule: Schedule, size: Mapping[str, int]) -> None:
        """Take note of a request that is cached by a curve: if many are like it, they are worth a matrix."""
        self._course(schedule, size).cached += 1

    def _course(self, schedule: Schedule, size: Mapping[str, int]) -> Course:
        """If there are too many, the one that is least advanced goes, the oldest of equals."""
        if schedule not in self._under_way:
            if len(self._under_way) == MOST_SCHEDULES:
                del self._under_way[min(self._under_way, key=lambda other: self._under_way[other].progress)]
            self._under_way[schedule] = Course(dict(size))
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
            more = {"kind": LEARNT, "switches": list(schedule.switches), "size": dict(course.size)}
            profiles.append(profile.model_copy(update={"provenance": profile.provenance | more}))
            logger.info("magcache: learnt %s; requests are cached with it from now on", name)
            keep(profiles[-1])
        return profiles

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
            if course.wants_runs or not course.cached:
                kind = "runs" if course.cached else "requests"
                parts.append(f"{course.calibration.requests} of {REQUESTS} {kind} of {schedule.steps} steps")
        return ", ".join(parts)


def keep(profile: CacheProfile) -> None:
    """Write a learnt profile, unless another process has one that lacks less.

    One that cannot be written lasts as long as the process.
    """
    path = profile_folder() / f"{profile.name}-{profile.fingerprint}-{len(profile.ratios)}.json"
    try:
        with suppress(InvalidValueError):
            if path.exists() and len(load_profile(path).lacks) < len(profile.lacks):
                return
        profile.save(path)
    except OSError as error:
        logger.warning("the learnt profile %s cannot be kept: %s", profile.name, error)


def unfinished(profile: CacheProfile) -> bool:
    """Whether a profile was learnt, and still lacks something that runs of its own would give."""
    return profile.provenance.get("kind") == LEARNT and len(profile.ratios) >= LEAST_STEPS and bool(profile.lacks)


def covers(profile: CacheProfile, schedule: Schedule) -> bool:
    """Whether a profile says something of a schedule; one that was learnt does so of those like its own alone.

    That is about as many steps, the same switches, and no three noise levels between two measured ones, or two beyond
    the last: their residuals would lie on one line, and forecasting one from the others would seem to cost nothing.
    A schedule without `sigmas` is judged by its steps.
    """
    measured, wanted = len(profile.ratios), schedule.steps
    if profile.provenance.get("kind") != LEARNT:
        return True
    if max(measured, wanted) > FAR * min(measured, wanted):
        return False
    if profile.sigmas is None or not schedule.sigmas:
        return profile.sigmas is not None
    if profile.provenance.get("switches", []) != list(schedule.switches):
        return False
    if measured == wanted and np.allclose(profile.sigmas, schedule.sigmas, rtol=1e-4, atol=1e-5):
        return True
    known = np.unique(profile.sigmas)
    if len(known) < 2:
        return False
    ends = 2 * known[0] - known[1], 2 * known[-1] - known[-2]
    levels = np.sort(schedule.sigmas)
    places = np.interp(levels, [ends[0], *known, ends[1]], np.arange(-1, len(known) + 1)).round(3)
    inside = places[0] > -1 and places[-1] < len(known) and places[1] > 0 and places[-2] < len(known) - 1
    return bool(inside and (np.ceil(places[2:]) - np.floor(places[:-2]) > 1).all())


def chosen(profiles: Sequence[CacheProfile], schedule: Schedule) -> CacheProfile | None:
    """The one to plan a schedule with: the nearest of those that cover it, of those with a matrix if there are any.

    If there are only some that do not, it is the curve of the nearest, which the published rule can do with.
    """

    def away(profile: CacheProfile) -> tuple[float, float]:
        sigmas = profile.sigmas or ()
        same = len(sigmas) == len(schedule.sigmas) > 0
        apart = float(np.abs(np.subtract(sigmas, schedule.sigmas)).mean().round(4)) if same else 0.0
        return abs(math.log(len(profile.ratios) / schedule.steps)), apart

    fitting = [profile for profile in profiles if covers(profile, schedule)]
    fitting = [profile for profile in fitting if profile.gram is not None] or fitting
    if fitting or not profiles:
        return min(fitting, key=away, default=None)
    return _curve_of(min(profiles, key=away))


@lru_cache(maxsize=32)
def _curve_of(profile: CacheProfile) -> CacheProfile:
    return profile.curve_alone()
