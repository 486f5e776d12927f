"""EasyCache (arXiv 2507.02860): how fast the output follows the latents tells how far it has moved."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.cache.gate import (
    INPUT,
    OUTPUT,
    PREVIOUS,
    RATE,
    Gate,
    Look,
    comparable,
    keep,
    mean_abs,
)
from vllm_omni.diffusion.cache.gate_backend import GateBackend
from vllm_omni.diffusion.cache.store import ResidualShelf


class EasyCacheGate(Gate):
    """Sum of k |x_t - x_(t-1)| / |v_s|, with k = |v_s - v_s'| / |x_s - x_s'| of the last two computed steps s', s."""

    name, look, threshold = "easycache", Look.LATENTS, 0.05

    def change(self, now: torch.Tensor, seen: ResidualShelf) -> torch.Tensor | None:
        if RATE not in seen or OUTPUT not in seen or not comparable(seen, PREVIOUS, now):
            return None
        moved = mean_abs(now.float() - seen[PREVIOUS].float())
        if moved.shape != seen[RATE].shape:
            return None
        return seen[RATE] * moved / mean_abs(seen[OUTPUT]).clamp_min(1e-12)

    def learn(self, seen: ResidualShelf, latents: torch.Tensor, output: torch.Tensor) -> None:
        if comparable(seen, INPUT, latents) and comparable(seen, OUTPUT, output):
            moved = mean_abs(latents.float() - seen[INPUT].float()).clamp_min(1e-12)
            keep(seen, RATE, mean_abs(output.float() - seen[OUTPUT].float()) / moved)
        keep(seen, INPUT, latents)
        keep(seen, OUTPUT, output.clone())  # a slice would keep the whole batch alive


class EasyCacheBackend(GateBackend):
    name, rule = "easycache", EasyCacheGate
