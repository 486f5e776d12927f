"""The MagCache backend: finds the checkpoint's curve and profile; everything else is shared machinery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from vllm_omni.diffusion.cache.base import StackBackend, model_name_of
from vllm_omni.diffusion.cache.calibration import Calibration
from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategyRegistry
from vllm_omni.diffusion.cache.plan.compose import (
    MAX_COHERENT_STEPS,
    CachePlan,
    choose_forecast,
    compose,
    full_forwards,
    rule_of,
)
from vllm_omni.diffusion.cache.plan.predictors import NEED_GRAM
from vllm_omni.diffusion.cache.plan.schedule import Schedule, Switches
from vllm_omni.diffusion.cache.profile import (
    CacheProfile,
    find_profiles,
    fingerprint,
    named_profile,
    profile_names,
)
from vllm_omni.diffusion.cache.settings import Budget, CacheSettings, DiffusionCacheConfig, Mask, Preset
from vllm_omni.diffusion.cache.state import CacheState, PlannedState
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.specs import DenoiserSpec
from vllm_omni.errors import InvalidValueError
from vllm_omni.learning import LEAST_STEPS, Learning, chosen, keep, replaced, unfinished
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


class MagCacheBackend(StackBackend):
    """`enable` on a pipeline, then run it (one anonymous request), or `refresh` per request, as the engine does."""

    name = "magcache"

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        self.calibration = Calibration() if config.mag_calibrate else None
        self.learning: Learning | None = None
        self._ratios: tuple[float, ...] | None = None
        self._class = self._fingerprint = ""
        self._reported_no_gain = self._bare = False

    def plan(self, steps: int, sigmas: Sequence[float], switches: Switches = ()) -> CachePlan:
        """What a request of this schedule would do under the backend's own settings."""
        schedule = Schedule(steps, tuple(sigmas), switches)
        return compose(self.settings, *self._measured(self.settings, schedule), schedule)

    def check(self, settings: CacheSettings, steps: int | None = None) -> None:
        """Refuse what this checkpoint, or a schedule of at most `steps`, cannot have, before any step runs."""
        schedule = None if steps is None else Schedule(steps, ())
        if self.waits(settings, schedule):  # it runs uncached, whatever it asks for
            return
        ratios, profile = self._measured(settings, schedule)
        if ratios is None and not isinstance(settings.plan, Mask):
            raise self._no_curve(model_name_of(self._pipeline))
        if steps is not None and not (isinstance(settings.plan, Budget) and settings.plan.seconds):
            full_forwards(settings, profile, Schedule(steps, ()))
        choose_forecast(settings, profile)

    def state(self, schedule: Schedule, settings: CacheSettings | None = None) -> CacheState:
        if self.calibration is not None:
            return self.calibration.state(schedule)
        self.learn()
        settings = settings or self.settings
        if self.waits(settings, schedule):
            return CacheState()
        ratios, profile = self._measured(settings, schedule)
        plan = compose(settings, ratios, profile, schedule)
        if all(plan.compute) and not self._reported_no_gain:
            self._reported_no_gain = True
            logger.info("magcache: nothing to gain in %d steps, every one of them computes", schedule.steps)
        facts: dict[str, object] = {
            "backend": "magcache",
            **_plan_facts(settings, profile, schedule),
            "planned_forwards": plan.full_forwards,
            "predictor": plan.predictor,
            "forecasts": plan.forecasts,
            "profile": profile.name if profile is not None else None,
        }
        best = profile.budget_at(plan.full_forwards) if profile is not None else None
        if best is not None and best.fewer_steps_are_nearer:
            facts["fewer_steps_are_nearer"] = True  # on held-out prompts, an uncached run of as many steps
        if schedule.switches:
            facts["switches"] = schedule.switches
        return PlannedState(plan, self.store, facts)

    def noticed(
        self, state: CacheState, schedule: Schedule, settings: CacheSettings, asked: Mapping[str, Any] | None
    ) -> CacheState:
        named = settings.config.profile not in (None, self.config.profile)
        if self.learning is None or asked is None or named or schedule.steps < LEAST_STEPS:
            return state
        _, profile = self._measured(settings, schedule)
        if profile is not None and profile.gram is not None:
            return state
        if state.plan is None:  # it computes every step anyway
            return self.learning.state(schedule, asked) or state
        if schedule.steps <= MAX_COHERENT_STEPS:  # more are planned by the rule, whatever is known
            self.learning.note(schedule, asked)
        return state

    def waits(self, settings: CacheSettings, schedule: Schedule | None) -> bool:
        if isinstance(settings.plan, Mask) or settings.config.profile not in (None, self.config.profile):
            return False
        ratios, profile = self._measured(settings, schedule)
        if ratios is None:
            return self.learning is not None or self._bare
        other = settings != self.settings
        if self.learning is None or (self.learning.over and other):
            return False
        decibels = isinstance(settings.plan, Budget) and settings.plan.psnr is not None
        if profile is None or profile.gram is None:
            return decibels or settings.config.predictor in NEED_GRAM
        to_come = not profile.has_figures and unfinished(profile)
        return decibels and to_come and not (other and profile in self.learning.left)

    def learn(self) -> CacheProfile | None:
        """Take over what was learnt by now; returns a profile that lacks what runs of its own would give, if any."""
        if self.learning is None:
            return None
        self.profiles += tuple(self.learning.ready())
        return self.learning.unfinished([one for one in self.profiles if one.fingerprint == self._fingerprint])

    def weights_changed(self) -> None:
        """Find the profile of a denoiser that has other weights now, or learn one if the settings let it.

        Otherwise the one in use stays, and the log says so: whoever trains beside wants the cache to go on.
        """
        now = fingerprint(next(iter(self.denoisers.values())).module)
        if now == self._fingerprint:
            return
        self._fingerprint, name = now, model_name_of(self._pipeline)
        found = find_profiles(name, now)
        if self.config.calibrate == "auto" and not self.config.profile and self._ratios is None:
            self.learning, self.profiles = Learning(self._class, now, name), found
        elif found and not self.config.profile:
            self.profiles = found
        elif self.profiles:
            logger.warning("magcache: profile %s is of the weights before the update", self.profiles[0].name)

    def learnt(self, profile: CacheProfile) -> None:
        """A profile that `learn` returned has more to it now."""
        self.profiles = replaced(self.profiles, profile)
        keep(profile)

    def _measured(
        self, settings: CacheSettings, schedule: Schedule | None
    ) -> tuple[tuple[float, ...] | None, CacheProfile | None]:
        """The curve and the profile for settings and a schedule, None for one that is not known yet.

        The profile is the one that the settings name, or the one `chosen` of the checkpoint's; a curve that was given,
        with the request or for the engine, comes before the profile's.
        """
        config = settings.config
        another = config.profile not in (None, self.config.profile)
        if another:
            profile: CacheProfile | None = self._named(config.profile or "", config.profile_insist)
        elif schedule is None or self.config.profile:
            profile = next(iter(self.profiles), None)
        else:
            profile = chosen(self.profiles, schedule)
        ratios = config.mag_ratios or (None if another else self._ratios)
        return ratios or (profile.ratios if profile is not None else None), profile

    def _named(self, name: str, insist: bool) -> CacheProfile:
        own = next((profile for profile in self.profiles if profile.name == name), None)
        profile = own or named_profile(name)
        if profile.transformer_class != self._class:
            fix = f"must be of a {self._class}, not of a {profile.transformer_class}"
            raise InvalidValueError("profile", name, fix)
        if not insist and profile.fingerprint not in (None, self._fingerprint):
            raise InvalidValueError(
                "profile",
                name,
                f"was measured on other weights (hash {profile.fingerprint}, these: {self._fingerprint}); calibrate "
                "this checkpoint, or take it all the same with profile_insist=True",
            )
        return profile

    def _spec(self, module: torch.nn.Module) -> DenoiserSpec | None:
        return MagCacheStrategyRegistry.spec_of(module)

    def _found(self, denoiser: Denoiser, model_name: str) -> None:
        """The profile named in the settings, or the checkpoint's own ones; a curve that the user gave comes first."""
        self._class, self._fingerprint = denoiser.name, fingerprint(denoiser.module)
        if self.config.profile:
            self.profiles = (self._named(self.config.profile, self.config.profile_insist),)
        else:
            self.profiles = find_profiles(model_name, self._fingerprint)
        self._ratios = self.config.mag_ratios or MagCacheStrategyRegistry.users_curve(denoiser.module)
        _report(self.profiles)
        given = self.config.profile or self._ratios or self.config.steps_mask
        if self.config.calibrate == "auto" and (not given or any(map(unfinished, self.profiles))):
            self.learning = Learning(self._class, self._fingerprint, model_name)
            return
        self._bare = self.many_ranks and not given and not self.profiles and not self.by_request
        if self._bare:
            logger.warning("magcache: no profile of this checkpoint, and ranks learn none: it is served uncached")
        elif not given and not self.profiles and self.calibration is None and not self.by_request:
            raise self._no_curve(model_name)
        choose_forecast(self.settings, next(iter(self.profiles), None))
        decibels = isinstance(self.settings.plan, Budget) and self.settings.plan.psnr is not None
        if decibels and not self._bare and not any(profile.has_figures for profile in self.profiles):
            full_forwards(self.settings, None, Schedule(1, ()))

    def _no_curve(self, model_name: str = "") -> InvalidValueError:
        return InvalidValueError(
            "mag_ratios",
            None,
            f"must be given: no magnitude curve is known for this checkpoint ({model_name or 'unnamed'}); "
            "learn one from the first requests with calibrate='auto', measure one with `vllm-omni calibrate MODEL` "
            "and pass profile='FILE', or, if it is one of these checkpoints, its profile by name: "
            f"{', '.join(profile_names(self._class)) or 'none of this class'}",
        )


@lru_cache(maxsize=64)
def _report(profiles: tuple[CacheProfile, ...]) -> None:
    """Say once per process what is in use, and what it lacks."""
    for profile in profiles:
        lacks = f", which has no {' and no '.join(profile.lacks)}; calibrate again" if profile.lacks else ""
        logger.info("magcache: profile %s%s", profile.name, lacks)


def _plan_facts(settings: CacheSettings, profile: CacheProfile | None, schedule: Schedule) -> dict[str, object]:
    """What the plan was made of, for the output: the budget, the preset or the mask, else the rule's settings."""
    plan = settings.plan
    if isinstance(plan, Budget):
        return {name: value for name, value in vars(plan).items() if value is not None}
    if isinstance(plan, Mask):
        return {"steps_mask": plan.flags}
    preset: dict[str, object] = {"preset": plan.name} if isinstance(plan, Preset) else {}
    if full_forwards(settings, profile, schedule) is not None:
        return preset
    return preset | vars(rule_of(settings))
