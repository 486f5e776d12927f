"""A gate as a cache backend."""

from __future__ import annotations

from typing import ClassVar

from vllm_omni.diffusion.cache.clock import Schedule
from vllm_omni.diffusion.cache.gate import Gate, GateCache, check_gate_config
from vllm_omni.diffusion.cache.stack_backend import KEPT_AS, StackBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig


class GateBackend(StackBackend):
    """`rule` is the gate's class; a gate with settings of its own overrides `gate`."""

    rule: ClassVar[type[Gate]]

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        check_gate_config(self.name, config)

    def gate(self, config: DiffusionCacheConfig) -> Gate:
        return self.rule()

    def check(self, config: DiffusionCacheConfig, steps: int | None = None) -> None:
        check_gate_config(self.name, config)
        self.gate(config)

    def _record(self, schedule: Schedule, config: DiffusionCacheConfig | None = None) -> GateCache:
        config = config or self.config
        kept_as = KEPT_AS[self.config.residual_dtype]
        return GateCache(self.gate(config), config, schedule.steps, schedule.sigmas, self.store, kept_as)
