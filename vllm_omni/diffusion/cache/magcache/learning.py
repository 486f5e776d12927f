"""A checkpoint without a profile gets one from the first requests that it serves: they run uncached, and are measured.

Nothing of a request is kept but sums of products of its residuals' sketches. What needs runs of its own (gains, the
choice for each budget and its decibels) is for whoever has time to spare: `unfinished` says which profiles lack it.
"""

from __future__ import annotations

from contextlib import suppress

from vllm_omni.diffusion.cache.calibration import Calibration, RecordingState
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile, load_profile
from vllm_omni.envs import profile_folder
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

MOST_SCHEDULES = 8  # under way at a time: requests may bring noise levels of their own
LEAST_STEPS = 4  # of a schedule with something to leave out
REQUESTS = 4  # that a profile is made from; how many more would change its plans is not measured
KIND = "learnt"


class Learning:
    """Measures the requests of each schedule, and makes a profile once there are enough."""

    def __init__(self, transformer_class: str, fingerprint: str, model_name: str) -> None:
        self._class, self._fingerprint, self._model_name = transformer_class, fingerprint, model_name
        self._under_way: dict[Schedule, Calibration] = {}

    def state(self, schedule: Schedule) -> RecordingState:
        """The state of a request that computes every step, and is measured."""
        if schedule not in self._under_way:
            if not self._under_way:
                logger.info("magcache: no profile of this checkpoint; one is learnt from %d requests", REQUESTS)
            if len(self._under_way) == MOST_SCHEDULES:
                del self._under_way[next(iter(self._under_way))]
            self._under_way[schedule] = Calibration()
        return self._under_way[schedule].state(schedule)

    def ready(self) -> list[CacheProfile]:
        """The profiles that can be made by now, each once; they are written where the next start finds them."""
        done = [schedule for schedule, found in self._under_way.items() if found.requests >= REQUESTS]
        profiles = []
        for schedule in done:
            name = f"{self._model_name.rpartition('/')[2] or self._class}-{schedule.steps}"[-200:]
            try:
                profile = self._under_way.pop(schedule).profile(name, self._class, self._fingerprint)
            except InvalidValueError as error:
                logger.warning("magcache: what was measured of %s makes no profile: %s", name, error)
                continue
            more = {"kind": KIND, "switches": list(schedule.switches)}
            profiles.append(profile.model_copy(update={"provenance": profile.provenance | more}))
            logger.info("magcache: learnt %s; requests are cached from now on", name)
            keep(profiles[-1])
        return profiles

    @property
    def progress(self) -> str:
        """What is being learnt, in words; "" if nothing is."""
        parts = (f"{found.requests} of {REQUESTS} requests of {s.steps} steps" for s, found in self._under_way.items())
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
    return profile.provenance.get("kind") == KIND and len(profile.ratios) >= LEAST_STEPS and bool(profile.lacks)
