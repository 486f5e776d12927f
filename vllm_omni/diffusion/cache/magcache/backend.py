"""The MagCache backend: chooses curve, plan and predictor; everything else is shared machinery."""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.calibration import Calibration
from vllm_omni.diffusion.cache.clock import SchedulerClock, schedule_of
from vllm_omni.diffusion.cache.forward import Record
from vllm_omni.diffusion.cache.magcache.plan import (
    choose_predictor,
    plan_request,
    preset_forwards,
    promised_forwards,
)
from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategyRegistry
from vllm_omni.diffusion.cache.profile import CacheProfile, find_profile, fingerprint, named_profile, profile_names
from vllm_omni.diffusion.cache.request_cache import CachePlan, RequestCache
from vllm_omni.diffusion.cache.standalone import Session, StandaloneHook, attach, detach
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.data import PROMISES, DiffusionCacheConfig
from vllm_omni.diffusion.denoisers import DENOISER_NAMES
from vllm_omni.diffusion.hooks.block_stack import BlockStack
from vllm_omni.errors import InvalidValueError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
_KEPT_AS = {"model": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MagCacheBackend(CacheBackend):
    """`enable` on a pipeline, then run it (one anonymous request), or `refresh` per request, as the engine does."""

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        for name in ("coefficients", "rel_l1_thresh"):
            if (value := vars(config)[name]) is not None:
                raise InvalidValueError(name, value, "is a TeaCache setting, magcache has no use for it; leave it out")
        budget = config.memory_budget_mb
        self.store = CacheStore(None if budget is None else int(budget * 2**20))
        self.calibration = Calibration() if config.mag_calibrate else None
        self.stacks: dict[str, BlockStack] = {}
        self.profile: CacheProfile | None = None
        self._ratios: tuple[float, ...] | None = None
        self._class = self._fingerprint = ""
        self._session: Session | None = None
        self._modules: list[torch.nn.Module] = []

    def enable(self, pipeline: Any, *, standalone: bool = True) -> None:
        """Find the block stacks and the checkpoint's curve. `standalone` False: an engine opens the scopes itself.

        InvalidValueError where the checkpoint has no curve, or no denoiser whose blocks are known.
        """
        self.disable(pipeline)
        found = {}
        for name in DENOISER_NAMES:
            module = pipeline.components.get(name)
            strategy = MagCacheStrategyRegistry.get_if_exists(_class_name(module))
            if module is not None and strategy is not None:
                found[name] = (module, strategy.spec)
        if not found:
            raise InvalidValueError(
                "cache_backend",
                "magcache",
                f"does not know the blocks of {type(pipeline).__name__}; serve it with 'none'",
            )
        first = next(iter(found.values()))[0]
        self._find_curve(first, str(pipeline.config.get("_name_or_path", "")))
        self.stacks = {name: BlockStack(module, spec) for name, (module, spec) in found.items()}
        if standalone:
            self._session = Session(SchedulerClock(pipeline), self._record)
            for name, (module, spec) in found.items():
                attach(module, StandaloneHook(name, self.stacks[name], spec, self._session))
                self._modules.append(module)
        self.enabled = True

    def refresh(
        self,
        pipeline: Any,
        num_inference_steps: int | None,
        verbose: bool = True,
        *,
        request_id: str | None = None,
        config: DiffusionCacheConfig | None = None,
    ) -> Record | None:
        """Fresh state for the next request.

        Without `request_id` the pipeline's anonymous request is forgotten; its next run is planned for the schedule it
        really runs. With one, the state of that request: its plan for the schedule `pipeline` has set up, under
        `config` (its own settings) or the backend's.
        """
        if not self.enabled:
            self.enable(pipeline)
        if request_id is None:
            if self._session is not None:
                self._session.restart()
            return None
        steps, sigmas = schedule_of(pipeline)
        return self._record(steps, sigmas, config)

    def disable(self, pipeline: Any) -> None:
        if self._session is not None:
            self._session.restart()
            self._session.clock.stop()
            self._session = None
        for module in self._modules:
            detach(module)
        self._modules.clear()
        self.stacks.clear()
        self.enabled = False

    @property
    def last_request(self) -> Record | None:
        """The anonymous request's state: its plan, and how many steps it computed and skipped."""
        return self._session.record if self._session is not None else None

    def plan(self, steps: int, sigmas: tuple[float, ...], config: DiffusionCacheConfig | None = None) -> CachePlan:
        """What a request of `steps` would do; pure, cheap, and the same on every rank."""
        config = config or self.config
        profile = self._profile_for(config)
        ratios = config.mag_ratios or (self._ratios if profile is self.profile else None)
        if ratios is None and profile is not None:
            ratios = profile.ratios
        return plan_request(config, ratios, profile, steps, sigmas)

    def check(self, config: DiffusionCacheConfig, steps: int | None = None) -> None:
        """Refuse settings that this checkpoint, or a schedule of at most `steps`, cannot have, before any step runs."""
        if steps is not None and config.seconds is None:
            promised_forwards(config, steps)
        self.plan(2, (1.0, 0.5), config.model_copy(update=dict.fromkeys(PROMISES)))

    def _record(self, steps: int, sigmas: tuple[float, ...], config: DiffusionCacheConfig | None = None) -> Record:
        if self.calibration is not None:
            return self.calibration.record(steps, sigmas)
        config = config or self.config
        profile = self._profile_for(config)
        plan = self.plan(steps, sigmas, config)
        settings: dict[str, object] = {
            "backend": "magcache",
            **self._made_of(config, profile, steps),
            "planned_forwards": plan.full_forwards,
            "predictor": choose_predictor(config, profile),
            "profile": profile.name if profile is not None else None,
        }
        return RequestCache(plan, self.store, settings, _KEPT_AS[self.config.residual_dtype])

    def _made_of(self, config: DiffusionCacheConfig, profile: CacheProfile | None, steps: int) -> dict[str, object]:
        """What the plan was made of, for the output: the promise, the preset or the mask, else the rule's settings."""
        if config.promise:
            return {**config.promise}
        if config.steps_mask is not None:
            return {"steps_mask": config.steps_mask}
        preset = {} if config.preset is None else {"preset": config.preset}
        if preset_forwards(config, profile, steps) is not None:
            return {**preset}
        return preset | {
            "threshold": config.mag_threshold,
            "max_skip_steps": config.mag_max_skip_steps,
            "retention_ratio": config.mag_retention_ratio,
        }

    def _profile_for(self, config: DiffusionCacheConfig) -> CacheProfile | None:
        if config.profile in (None, self.config.profile):
            return self.profile
        return self._named(config.profile, config.profile_insist)

    def _named(self, name: str, insist: bool) -> CacheProfile:
        profile = named_profile(name)
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

    def _find_curve(self, module: torch.nn.Module, model_name: str) -> None:
        """The profile named in the settings, or the checkpoint's own; a curve that the user gave comes first."""
        self._class, self._fingerprint = _class_name(module), fingerprint(module)
        if self.config.profile:
            self.profile = self._named(self.config.profile, self.config.profile_insist)
        else:
            self.profile = find_profile(model_name, self._fingerprint)
        self._ratios = self.config.mag_ratios or MagCacheStrategyRegistry.users_curve(_class_name(module))
        if self.profile is not None:
            logger.info("magcache: profile %s", self.profile.name)
        nothing = self._ratios is None and self.profile is None and self.config.steps_mask is None
        if nothing and self.calibration is None:
            raise InvalidValueError(
                "mag_ratios",
                None,
                f"must be given: no magnitude curve is known for this checkpoint ({model_name or 'unnamed'}); "
                "measure one with `vllm-omni calibrate MODEL` and pass profile='FILE', or, if it is one of these "
                f"checkpoints, its profile by name: {', '.join(profile_names(self._class)) or 'none of this class'}",
            )
        choose_predictor(self.config, self.profile)


def _class_name(module: Any) -> str:
    return type(module).__name__
