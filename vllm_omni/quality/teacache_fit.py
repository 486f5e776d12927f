"""TeaCache's coefficients for a checkpoint that has none published, measured on its own prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.cache.gates.gate import PREVIOUS, GateBackend, GateRule, Memory, comparable, relative_l1
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig
from vllm_omni.diffusion.cache.state import Signal
from vllm_omni.errors import InvalidValueError

OUTPUT = "output"  # of the last computed step


class _Meter(GateRule):
    """Never skips; notes how much the modulated input and the output change from step to step."""

    name, signal, threshold, accumulates = "teacache", Signal.MODULATED, 1.0, False

    def __init__(self) -> None:
        self.inputs: list[float] = []
        self.outputs: list[float] = []

    def change(self, now: torch.Tensor, memory: Memory) -> torch.Tensor | None:
        if comparable(memory, PREVIOUS, now):
            self.inputs.append(relative_l1(now, memory[PREVIOUS]).max().item())
        return None

    def learn(self, memory: Memory, latents: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        if comparable(memory, OUTPUT, output):
            self.outputs.append(relative_l1(output, memory[OUTPUT]).max().item())
        return {OUTPUT: output.clone()}


class _MeterBackend(GateBackend):
    name, rule = "teacache", _Meter

    def __init__(self) -> None:
        super().__init__(DiffusionCacheConfig(mag_retention_ratio=0.0, compute_last_step=False))
        self.meter = _Meter()

    def make_rule(self, config: DiffusionCacheConfig) -> GateRule:
        return self.meter


def fit_coefficients(pipeline: Any, runs: Sequence[Callable[[], Any]], degree: int = 4) -> tuple[float, ...]:
    """Coefficients for a checkpoint: a polynomial from the modulated input's to the output's relative L1 change.

    Each of `runs` calls `pipeline` once, without guidance branches of its own; they are computed in full. The published
    ones are of degree 4 and some 70 prompts. InvalidValueError where there are fewer pairs than coefficients.
    """
    backend = _MeterBackend()
    backend.enable(pipeline)
    try:
        for run in runs:
            run()
    finally:
        backend.disable(pipeline)
    inputs, outputs = backend.meter.inputs, backend.meter.outputs
    if len(inputs) != len(outputs) or len(inputs) <= degree:
        raise InvalidValueError(
            "runs", len(runs), f"must give at least {degree + 1} pairs of steps, without guidance branches"
        )
    return tuple(float(c) for c in np.polyfit(inputs, outputs, degree))
