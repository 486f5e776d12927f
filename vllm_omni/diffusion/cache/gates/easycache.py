"""EasyCache (arXiv 2507.02860): how fast the output follows the latents says how far it has moved."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.cache.gates.gate import PREVIOUS, GateBackend, GateRule, Memory, comparable, mean_abs
from vllm_omni.diffusion.cache.state import Signal

INPUT, OUTPUT, RATE = "input", "output", "rate"  # of the last computed step


class EasyCacheRule(GateRule):
    """Sum of k |x_t - x_(t-1)| / |v_s|, with k = |v_s - v_s'| / |x_s - x_s'| of the last two computed steps s', s."""

    name, signal, threshold = "easycache", Signal.LATENTS, 0.05

    def change(self, now: torch.Tensor, memory: Memory) -> torch.Tensor | None:
        if RATE not in memory or OUTPUT not in memory or not comparable(memory, PREVIOUS, now):
            return None
        moved = mean_abs(now.float() - memory[PREVIOUS].float())
        if moved.shape != memory[RATE].shape:
            return None
        return memory[RATE] * moved / mean_abs(memory[OUTPUT]).clamp_min(1e-12)

    def learn(self, memory: Memory, latents: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        learnt = {INPUT: latents.clone(), OUTPUT: output.clone()}  # theirs is a slice of a batch, or written again
        if comparable(memory, INPUT, latents) and comparable(memory, OUTPUT, output):
            moved = mean_abs(latents.float() - memory[INPUT].float()).clamp_min(1e-12)
            learnt[RATE] = mean_abs(output.float() - memory[OUTPUT].float()) / moved
        return learnt


class EasyCacheBackend(GateBackend):
    """EasyCache as a cache backend."""

    name, rule = "easycache", EasyCacheRule
