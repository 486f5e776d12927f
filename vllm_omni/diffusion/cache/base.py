"""What every cache backend is, to the engine and to a plain pipeline, and what those on block stacks share.

Knows no method: a backend is a choice of plan or gate, predictor and profile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.settings import CacheSettings, DiffusionCacheConfig, parse
from vllm_omni.diffusion.cache.standalone import Session, StandaloneHook, attach, detach, refuse_other_caches
from vllm_omni.diffusion.cache.state import CacheState
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.discover import has_blocks
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.specs import DenoiserSpec, denoisers_of
from vllm_omni.diffusion.denoiser.step_tracker import CallTracker, StepTracker, Tracker, schedule_of
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops

DEFAULT_STEPS = 28  # of a bare denoiser, unless the settings say
KEPT_AS = {"model": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8": ops.EIGHT_BITS}


def store_for(config: DiffusionCacheConfig) -> CacheStore:
    """An empty store with the budget and the dtype of these settings."""
    budget = config.memory_budget_mb
    return CacheStore(None if budget is None else int(budget * 2**20), KEPT_AS[config.residual_dtype])


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
    by_request = False  # requests ask for it, and bring what the checkpoint lacks
    many_ranks = False  # others make the same forwards

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        self.settings = parse(self.name, config)
        self.store = store_for(config)
        self.denoisers: dict[str, Denoiser] = {}
        self._pipeline: Any = None
        self._session: Session | None = None
        self._hooked: list[tuple[torch.nn.Module, StandaloneHook]] = []

    @abstractmethod
    def check(self, settings: CacheSettings, steps: int | None = None) -> None:
        """Refuse settings that this checkpoint, or a schedule of at most `steps`, cannot have, before any step runs."""

    @abstractmethod
    def state(self, schedule: Schedule, settings: CacheSettings | None = None) -> CacheState:
        """The state of a request that is about to run this schedule, under its own settings or the backend's."""

    def noticed(
        self, state: CacheState, schedule: Schedule, settings: CacheSettings, asked: Mapping[str, Any] | None
    ) -> CacheState:
        """`state`, or one that is measured too in its place, of a request that was `asked` so; None: it teaches not."""
        return state

    def waits(self, settings: CacheSettings, schedule: Schedule | None) -> bool:
        """Whether something that is still being learnt must be known before such a request can be cached."""
        return False

    def _spec(self, module: torch.nn.Module) -> DenoiserSpec | None:
        """A description of the user's own."""
        return None

    def _found(self, denoiser: Denoiser, model_name: str) -> None:
        """Take in the pipeline's first denoiser and where it came from; raise if the checkpoint lacks something."""

    def stack_for(self, name: str, arguments: Mapping[str, Any]) -> BlockStack | None:
        """The stack that a call of the denoiser `name` may be cached with; None: it computes."""
        denoiser = self.denoisers.get(name)
        return None if denoiser is None else denoiser.stack_for(arguments)

    def enable(self, pipeline: Any, *, standalone: bool = True, known: Mapping[str, Denoiser] | None = None) -> None:
        """Find the denoisers and what the checkpoint needs. `standalone` False: an engine opens the scopes itself, and
        has them examined: `known` are its own.

        InvalidValueError if the checkpoint lacks something, if no denoiser has blocks, or if another cache is on one.
        """
        self.disable(pipeline)
        modules = {name: module for name, module in denoisers_of(pipeline).items() if has_blocks(module)}
        if not modules:
            fix = f"finds no list of blocks in {type(pipeline).__name__}; serve it with 'none'"
            raise InvalidValueError("cache_backend", self.name, fix)
        for module in modules.values():
            refuse_other_caches(module)
        self.denoisers = {name: self._denoiser(module, (known or {}).get(name)) for name, module in modules.items()}
        self._found(next(iter(self.denoisers.values())), model_name_of(pipeline))
        self._pipeline = pipeline
        if standalone:
            self._session = Session(self._tracker(pipeline), self._alone)
            for name, module in modules.items():
                hook = StandaloneHook(name, self.denoisers[name], self.stack_for, self._session)
                attach(module, hook)
                self._hooked.append((module, hook))
        self.enabled = True

    def _alone(self, schedule: Schedule) -> CacheState:
        return self.noticed(self.state(schedule), schedule, self.settings, {})

    def _denoiser(self, module: torch.nn.Module, known: Denoiser | None) -> Denoiser:
        own = self._spec(module)
        return known if known is not None and own in (None, known.described) else Denoiser(module, own)

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
        if self._session is not None:
            self._session.restart(num_inference_steps)
        return None

    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline that `enable` was called with as it was."""
        if self._session is not None:
            self._session.restart()
            self._session.tracker.stop()
            self._session = None
        for denoiser in self.denoisers.values():
            denoiser.leave()  # an error within a forward can leave its scope open
        for module, _ in self._hooked:
            detach(module)
        self._hooked.clear()
        self.denoisers.clear()
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
