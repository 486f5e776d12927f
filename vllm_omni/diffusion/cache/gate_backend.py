"""A gate as a cache backend."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_omni.diffusion.cache.clock import Schedule
from vllm_omni.diffusion.cache.gate import Gate, GateCache, Look, check_gate_config
from vllm_omni.diffusion.cache.stack_backend import KEPT_AS, StackBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.hooks.block_stack import first_attention
from vllm_omni.errors import InvalidValueError


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

    def _found(self, module: torch.nn.Module, model_name: str) -> None:
        """Refuse what the gate could not look at, before any request comes."""
        spec, name = self._spec(type(module).__name__), type(module).__name__
        assert spec is not None
        if "hidden_states" not in spec.rows:
            raise InvalidValueError("cache_backend", self.name, f"cannot look at {name}, whose latents come as a list")
        first = module.get_submodule(f"{spec.stack[0].name}.0")
        if self.rule.look is Look.MODULATED and first_attention(first) is None:
            raise InvalidValueError("cache_backend", self.name, f"finds no attention in the blocks of {name}")

    def _record(self, schedule: Schedule, config: DiffusionCacheConfig | None = None) -> GateCache:
        config = config or self.config
        kept_as = KEPT_AS[self.config.residual_dtype]
        return GateCache(self.gate(config), config, schedule.steps, schedule.sigmas, self.store, kept_as)
