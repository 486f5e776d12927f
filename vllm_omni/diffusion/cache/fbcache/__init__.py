"""First-block cache (ParaAttention; cache-dit's DBCache F1B0): the first block runs at every step and decides."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.cache.gate import FIRST, Gate, Look, comparable, relative_l1
from vllm_omni.diffusion.cache.gate_backend import GateBackend
from vllm_omni.diffusion.cache.store import ResidualShelf


class FirstBlockGate(Gate):
    """Relative L1 change of the first block's residual since the last computed step.

    A skipped step is its own fresh first residual plus the forecast of what the other blocks add.
    """

    name, look, threshold, accumulates = "fbcache", Look.FIRST_BLOCK, 0.08, False

    def change(self, now: torch.Tensor, seen: ResidualShelf) -> torch.Tensor | None:
        return relative_l1(now, seen[FIRST]) if comparable(seen, FIRST, now) else None


class FirstBlockBackend(GateBackend):
    name, rule = "fbcache", FirstBlockGate
