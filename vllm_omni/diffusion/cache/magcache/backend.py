"""The MagCache backend: chooses curve, plan and predictor; everything else is shared machinery."""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni.diffusion.cache.calibration import Calibration
from vllm_omni.diffusion.cache.clock import Schedule
from vllm_omni.diffusion.cache.forward import Record
from vllm_omni.diffusion.cache.magcache.plan import (
    choose_predictor,
    plan_request,
    preset_forwards,
    promised_forwards,
)
from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategyRegistry
from vllm_omni.diffusion.cache.profile import (
    CacheProfile,
    find_profiles,
    fingerprint,
    named_profile,
    nearest,
    profile_names,
)
from vllm_omni.diffusion.cache.request_cache import CachePlan, RequestCache
from vllm_omni.diffusion.cache.stack_backend import KEPT_AS, StackBackend
from vllm_omni.diffusion.data import PROMISES, DiffusionCacheConfig
from vllm_omni.diffusion.denoisers import DenoiserSpec
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


class MagCacheBackend(StackBackend):
    """`enable` on a pipeline, then run it (one anonymous request), or `refresh` per request, as the engine does."""

    name = "magcache"

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        for name in ("coefficients", "rel_l1_thresh"):
            if (value := vars(config)[name]) is not None:
                raise InvalidValueError(name, value, "is a TeaCache setting, magcache has no use for it; leave it out")
        self.calibration = Calibration() if config.mag_calibrate else None
        self._ratios: tuple[float, ...] | None = None
        self._class = self._fingerprint = ""
        self._said_nothing_to_gain = False

    def _spec(self, class_name: str) -> DenoiserSpec | None:
        strategy = MagCacheStrategyRegistry.get_if_exists(class_name)
        return strategy.spec if strategy is not None else None

    def plan(
        self,
        steps: int,
        sigmas: tuple[float, ...],
        config: DiffusionCacheConfig | None = None,
        switches: tuple[int, ...] = (),
    ) -> CachePlan:
        """What a request of `steps` would do; pure, cheap, and the same on every rank.

        `switches` are the steps at which another denoiser takes over.
        """
        config = config or self.config
        profile = self._profile_for(config, steps)
        ratios = config.mag_ratios or (None if self._names_another(config) else self._ratios)
        if ratios is None and profile is not None:
            ratios = profile.ratios
        return plan_request(config, ratios, profile, steps, sigmas, switches)

    def check(self, config: DiffusionCacheConfig, steps: int | None = None) -> None:
        """Refuse settings that this checkpoint, or a schedule of at most `steps`, cannot have, before any step runs."""
        if steps is not None and config.seconds is None:
            promised_forwards(config, steps)
        self.plan(2, (1.0, 0.5), config.model_copy(update=dict.fromkeys(PROMISES)))

    def _record(self, schedule: Schedule, config: DiffusionCacheConfig | None = None) -> Record:
        if self.calibration is not None:
            return self.calibration.record(schedule.steps, schedule.sigmas)
        config = config or self.config
        profile = self._profile_for(config, schedule.steps)
        plan = self.plan(schedule.steps, schedule.sigmas, config, schedule.switches)
        if all(plan.compute) and not self._said_nothing_to_gain:
            self._said_nothing_to_gain = True
            logger.info("magcache: nothing to gain in %d steps, every one of them computes", schedule.steps)
        settings: dict[str, object] = {
            "backend": "magcache",
            **self._made_of(config, profile, schedule),
            "planned_forwards": plan.full_forwards,
            "predictor": choose_predictor(config, profile, plan.full_forwards),
            "profile": profile.name if profile is not None else None,
        }
        if schedule.switches:
            settings["switches"] = schedule.switches
        return RequestCache(plan, self.store, settings, KEPT_AS[self.config.residual_dtype])

    def _made_of(
        self, config: DiffusionCacheConfig, profile: CacheProfile | None, schedule: Schedule
    ) -> dict[str, object]:
        """What the plan was made of, for the output: the promise, the preset or the mask, else the rule's settings."""
        if config.promise:
            return {**config.promise}
        if config.steps_mask is not None:
            return {"steps_mask": config.steps_mask}
        preset = {} if config.preset is None else {"preset": config.preset}
        if preset_forwards(config, profile, schedule.steps, schedule.switches) is not None:
            return {**preset}
        return preset | {
            "threshold": config.mag_threshold,
            "max_skip_steps": config.mag_max_skip_steps,
            "retention_ratio": config.mag_retention_ratio,
        }

    def _profile_for(self, config: DiffusionCacheConfig, steps: int) -> CacheProfile | None:
        """The one that the request names, or of the checkpoint's the one measured nearest to its step count."""
        if self._names_another(config):
            return self._named(config.profile or "", config.profile_insist)
        return nearest(self.profiles, steps)

    def _names_another(self, config: DiffusionCacheConfig) -> bool:
        return config.profile not in (None, self.config.profile)

    def _named(self, name: str, insist: bool) -> CacheProfile:
        own = next((profile for profile in self.profiles if profile.name == name), None)
        profile = own or named_profile(name)
        if profile.transformer_class != self._class:
            raise InvalidValueError(
                "profile", name, f"must be of a {self._class}, not of a {profile.transformer_class}"
            )
        if not insist and profile.fingerprint not in (None, self._fingerprint):
            raise InvalidValueError(
                "profile",
                name,
                f"was measured on other weights (hash {profile.fingerprint}, these: {self._fingerprint}); calibrate "
                "this checkpoint, or take it all the same with profile_insist=True",
            )
        return profile

    def _found(self, module: torch.nn.Module, model_name: str) -> None:
        """The profile named in the settings, or the checkpoint's own ones; a curve that the user gave comes first."""
        self._class, self._fingerprint = _class_name(module), fingerprint(module)
        if self.config.profile:
            self.profiles = (self._named(self.config.profile, self.config.profile_insist),)
        else:
            self.profiles = find_profiles(model_name, self._fingerprint)
        self._ratios = self.config.mag_ratios or MagCacheStrategyRegistry.users_curve(_class_name(module))
        if self.profiles:
            logger.info("magcache: profile %s", ", ".join(self.profile_names))
        nothing = self._ratios is None and not self.profiles and self.config.steps_mask is None
        if nothing and self.calibration is None:
            raise InvalidValueError(
                "mag_ratios",
                None,
                f"must be given: no magnitude curve is known for this checkpoint ({model_name or 'unnamed'}); "
                "measure one with `vllm-omni calibrate MODEL` and pass profile='FILE', or, if it is one of these "
                f"checkpoints, its profile by name: {', '.join(profile_names(self._class)) or 'none of this class'}",
            )
        choose_predictor(self.config, next(iter(self.profiles), None))


def _class_name(module: Any) -> str:
    return type(module).__name__
