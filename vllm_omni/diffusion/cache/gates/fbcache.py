"""First-block cache (ParaAttention; cache-dit's DBCache F1B0): the first block runs at every step and decides."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.cache.gates.gate import FIRST, GateBackend, GateRule, Memory, comparable, relative_l1
from vllm_omni.diffusion.cache.state import Signal


class FirstBlockRule(GateRule):
    """Relative L1 change of the first block's residual since the last computed step.

    A skipped step is its own fresh first residual plus the forecast of what the other blocks add.
    """

    name, signal, threshold, accumulates = "fbcache", Signal.FIRST_BLOCK, 0.08, False

    def change(self, now: torch.Tensor, memory: Memory) -> torch.Tensor | None:
        return relative_l1(now, memory[FIRST], self.mean) if comparable(memory, FIRST, now) else None


class FirstBlockBackend(GateBackend):
    """The first-block cache as a cache backend."""

    name, rule = "fbcache", FirstBlockRule
