"""What every cache backend is, to the engine and to a plain pipeline, and what those on block stacks share.

Knows no method: a backend is a choice of plan or gate, predictor and profile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.settings import CacheSettings, DiffusionCacheConfig, parse
from vllm_omni.diffusion.cache.standalone import Session, StandaloneHook, attach, detach, refuse_other_caches
from vllm_omni.diffusion.cache.state import CacheState
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.specs import DenoiserSpec, denoisers_of, spec_of, unwrapped
from vllm_omni.diffusion.denoiser.step_tracker import CallTracker, StepTracker, Tracker, schedule_of
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops

DEFAULT_STEPS = 28  # of a bare denoiser, unless the settings say
KEPT_AS = {  # residual_dtype
    "model": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": ops.EIGHT_BITS,
}


class CacheBackend(ABC):
    """A choice of plan, predictor and profile, put on a pipeline's denoisers."""

    def __init__(self, config: DiffusionCacheConfig) -> None:
        self.config = config
        self.enabled = False

    @abstractmethod
    def enable(self, pipeline: Any) -> None:
        """Prepare the pipeline's denoisers; called once, at model load."""

    @abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> Any:
        """Fresh state for the request that is about to run `num_inference_steps` on `pipeline`."""

    @abstractmethod
    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline as `enable` found it."""

    def is_enabled(self) -> bool:
        return self.enabled

    def __repr__(self) -> str:
        return f"{type(self).__name__}(config={self.config!r})"


class StackBackend(CacheBackend):
    """`enable` on a pipeline, then run it (one anonymous request), or `refresh` per request, as the engine does."""

    name: ClassVar[str]
    profiles: tuple[CacheProfile, ...] = ()  # of the checkpoint, for backends that plan from one

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        self.settings = parse(self.name, config)
        budget = config.memory_budget_mb
        self.store = CacheStore(None if budget is None else int(budget * 2**20))
        self.stacks: dict[str, BlockStack] = {}
        self._pipeline: Any = None
        self._session: Session | None = None
        self._hooked: list[tuple[torch.nn.Module, StandaloneHook]] = []

    @property
    def profile_names(self) -> list[str]:
        """The names of the profiles in use."""
        return [profile.name for profile in self.profiles]

    @abstractmethod
    def check(self, settings: CacheSettings, steps: int | None = None) -> None:
        """Refuse settings that this checkpoint, or a schedule of at most `steps`, cannot have, before any step runs."""

    @abstractmethod
    def state(self, schedule: Schedule, settings: CacheSettings | None = None) -> CacheState:
        """The state of a request that is about to run this schedule, under its own settings or the backend's."""

    def _spec(self, module: torch.nn.Module) -> DenoiserSpec | None:
        return spec_of(module)

    def _found(self, module: torch.nn.Module, spec: DenoiserSpec, model_name: str) -> None:
        """Take in the pipeline's first denoiser and where it came from; raise if the checkpoint lacks something."""

    def enable(self, pipeline: Any, *, standalone: bool = True) -> None:
        """Find the block stacks and what the checkpoint needs. `standalone` False: an engine opens the scopes itself.

        InvalidValueError if the checkpoint lacks something, if no denoiser's blocks are known, or if another cache is
        on one of them.
        """
        self.disable(pipeline)
        modules = denoisers_of(pipeline)
        found = {n: (module, spec) for n, module in modules.items() if (spec := self._spec(module)) is not None}
        if not found:
            raise InvalidValueError(
                "cache_backend",
                self.name,
                f"does not know the blocks of {type(pipeline).__name__}; serve it with 'none'",
            )
        for module, _ in found.values():
            refuse_other_caches(module)
        self._found(*next(iter(found.values())), model_name_of(pipeline))
        self.stacks = {name: BlockStack(unwrapped(module), spec) for name, (module, spec) in found.items()}
        self._pipeline = pipeline
        if standalone:
            self._session = Session(self._tracker(pipeline), self.state)
            for name, (module, spec) in found.items():
                hook = StandaloneHook(name, self.stacks[name], spec, self._session)
                attach(module, hook)
                self._hooked.append((module, hook))
        self.enabled = True

    def _tracker(self, pipeline: Any) -> Tracker:
        """By the pipeline's scheduler; one without has its calls counted."""
        scheduler = getattr(pipeline, "scheduler", None)
        if hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step"):
            tracker = StepTracker(pipeline)
            tracker.on_begin = self._follow
            return tracker
        return CallTracker(self.config.num_inference_steps or DEFAULT_STEPS)

    def _follow(self) -> None:
        """If the pipeline has other denoisers than those that the cache is on, move there before they run."""
        modules = denoisers_of(self._pipeline)
        if any(modules.get(hook.name) is not module for module, hook in self._hooked):
            self.enable(self._pipeline)

    def refresh(
        self,
        pipeline: Any,
        num_inference_steps: int | None,
        verbose: bool = True,
        *,
        request_id: str | None = None,
        settings: CacheSettings | None = None,
    ) -> CacheState | None:
        """Fresh state for the next request.

        Without `request_id` the pipeline's anonymous request is forgotten; its next run is planned for the schedule it
        really runs, and `pipeline` is the one it runs on from now on. With one, the state of that request: for the
        schedule that `pipeline` has set up, under its own `settings` or the backend's.
        """
        if request_id is not None:
            if not self.enabled:
                self.enable(pipeline)
            return self.state(schedule_of(pipeline), settings)
        if not self.enabled or pipeline is not self._pipeline:
            self.enable(pipeline)
        if self._session is None:
            return None
        self._session.restart()
        if num_inference_steps is not None and isinstance(self._session.tracker, CallTracker):
            self._session.tracker.steps = num_inference_steps
        return None

    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline that `enable` was called with as it was."""
        if self._session is not None:
            self._session.restart()
            self._session.tracker.stop()
            self._session = None
        for stack in self.stacks.values():
            stack.leave()  # an error within a forward can leave its scope open
        for module, _ in self._hooked:
            detach(module)
        self._hooked.clear()
        self.stacks.clear()
        self._pipeline = None
        self.enabled = False

    @property
    def last_request(self) -> CacheState | None:
        """The anonymous request's state: its plan, and how many steps it computed and skipped."""
        return self._session.state if self._session is not None else None


def model_name_of(pipeline: Any) -> str:
    """Where the pipeline came from: a hub id or a folder; "" if it does not say."""
    config = getattr(pipeline, "_internal_dict", {})
    return str(config.get("_name_or_path") or "")
