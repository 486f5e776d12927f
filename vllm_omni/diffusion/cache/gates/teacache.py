"""TeaCache (arXiv 2411.19108): a polynomial of how much the first block's modulated input has changed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from vllm_omni.diffusion.cache.gates.gate import PREVIOUS, GateBackend, GateRule, Memory, comparable, relative_l1
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig
from vllm_omni.diffusion.cache.state import Signal
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.errors import InvalidValueError


@cache
def published_coefficients() -> dict[str, tuple[float, ...]]:
    """By hub id, highest power first, from the file beside this one, which names their source."""
    data = json.loads((Path(__file__).parent / "teacache_coefficients.json").read_text(encoding="utf-8"))
    return {name: tuple(entry["coefficients"]) for name, entry in data["checkpoints"].items()}


class TeaCacheRule(GateRule):
    """Sum of p(relative L1 change of the modulated input from one step to the next)."""

    name, signal, threshold = "teacache", Signal.MODULATED, 0.2

    def __init__(self, coefficients: Sequence[float]) -> None:
        if not all(math.isfinite(c) for c in coefficients):
            raise InvalidValueError("coefficients", coefficients, "must be finite numbers, highest power first")
        self.coefficients = tuple(coefficients)

    def change(self, now: torch.Tensor, memory: Memory) -> torch.Tensor | None:
        if not comparable(memory, PREVIOUS, now):
            return None
        x = relative_l1(now, memory[PREVIOUS], self.mean)
        total = torch.zeros_like(x)
        for coefficient in self.coefficients:
            total = total * x + coefficient
        return total


class TeaCacheBackend(GateBackend):
    """`coefficients` of the settings, else those published for the checkpoint's hub id."""

    name, rule = "teacache", TeaCacheRule
    _published: tuple[float, ...] | None = None

    def make_rule(self, config: DiffusionCacheConfig) -> GateRule:
        coefficients = config.coefficients or self._published
        if not coefficients:
            raise InvalidValueError(
                "coefficients",
                None,
                "must be given: none are published for this checkpoint; measure them with "
                f"`fit_coefficients`, or pass those of one of: {', '.join(published_coefficients())}",
            )
        return TeaCacheRule(coefficients)

    def _found(self, denoiser: Denoiser, model_name: str) -> None:
        super()._found(denoiser, model_name)
        self._published = published_coefficients().get(model_name)
        if not self.by_request:
            self.make_rule(self.config)
