"""What every backend does that works on block stacks: finds them, hooks them, gives each request its record."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.clock import Schedule, SchedulerClock, schedule_of
from vllm_omni.diffusion.cache.forward import Record
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.standalone import Session, StandaloneHook, attach, detach
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoisers import DENOISER_NAMES, DENOISERS, DenoiserSpec
from vllm_omni.diffusion.hooks.block_stack import BlockStack
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops

KEPT_AS = {  # residual_dtype
    "model": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": ops.EIGHT_BITS,
}


class StackBackend(CacheBackend):
    """`enable` on a pipeline, then run it (one anonymous request), or `refresh` per request, as the engine does."""

    name: ClassVar[str]
    profiles: tuple[CacheProfile, ...] = ()  # of the checkpoint, for backends that plan from one

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        budget = config.memory_budget_mb
        self.store = CacheStore(None if budget is None else int(budget * 2**20))
        self.stacks: dict[str, BlockStack] = {}
        self._session: Session | None = None
        self._modules: list[torch.nn.Module] = []

    @property
    def profile_names(self) -> list[str]:
        """Of the calibrated profiles in use."""
        return [profile.name for profile in self.profiles]

    @abstractmethod
    def check(self, config: DiffusionCacheConfig, steps: int | None = None) -> None:
        """Refuse settings that this checkpoint, or a schedule of at most `steps`, cannot have, before any step runs."""

    @abstractmethod
    def _record(self, schedule: Schedule, config: DiffusionCacheConfig | None = None) -> Record:
        """The state of a request that is about to run this schedule."""

    def _spec(self, class_name: str) -> DenoiserSpec | None:
        return DENOISERS.get(class_name)

    def _found(self, module: torch.nn.Module, model_name: str) -> None:
        """The pipeline's first denoiser, and where it came from; raises where the checkpoint lacks something."""

    def enable(self, pipeline: Any, *, standalone: bool = True) -> None:
        """Find the block stacks and what the checkpoint needs. `standalone` False: an engine opens the scopes itself.

        InvalidValueError where the checkpoint lacks something, or has no denoiser whose blocks are known.
        """
        self.disable(pipeline)
        found = {}
        for name in DENOISER_NAMES:
            module = pipeline.components.get(name)
            spec = self._spec(type(module).__name__)
            if module is not None and spec is not None:
                found[name] = (module, spec)
        if not found:
            raise InvalidValueError(
                "cache_backend",
                self.name,
                f"does not know the blocks of {type(pipeline).__name__}; serve it with 'none'",
            )
        self._found(next(iter(found.values()))[0], str(pipeline.config.get("_name_or_path", "")))
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
        really runs. With one, the state of that request: for the schedule `pipeline` has set up, under `config` (its
        own settings) or the backend's.
        """
        if not self.enabled:
            self.enable(pipeline)
        if request_id is None:
            if self._session is not None:
                self._session.restart()
            return None
        return self._record(schedule_of(pipeline), config)

    def disable(self, pipeline: Any) -> None:
        if self._session is not None:
            self._session.restart()
            self._session.clock.stop()
            self._session = None
        for module in self._modules:
            detach(module)
        self._modules.clear()
        for stack in self.stacks.values():
            stack.leave()  # an error while a residual was noted leaves its scope open
        self.stacks.clear()
        self.enabled = False

    @property
    def last_request(self) -> Record | None:
        """The anonymous request's state: its plan, and how many steps it computed and skipped."""
        return self._session.record if self._session is not None else None
