"""Gates: whether a step computes is decided from data, per request, before its forward. Knows no model.

A gate compares one tensor per call (the latents, the first block's modulated input, or the first block's residual) with
an earlier one, and says by how much it has changed. The comparison happens on the device; the changes of all requests
of a batch come to the host in one read. Everything else (residuals, predictors, budget) is what planned requests have.

A request decides once per step, at that step's first call, from the largest change over the call's own rows; all its
rows and guidance branches follow. No neighbour in the batch has a say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.cache.base import StackBackend
from vllm_omni.diffusion.cache.plan.predictors import NEED_GRAM, PREDICTORS
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.settings import PLANS, CacheSettings, DiffusionCacheConfig, GateSettings
from vllm_omni.diffusion.cache.state import CacheState, Computed, Forecast, Kept, Key, Signal
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.diffusion.denoiser.block_stack import BlockStack, first_attention
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.rows import latents_of
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops
from vllm_omni.kernels.splits import Split, mean_of_all

Memory = Mapping[str, torch.Tensor]  # what a gate has kept of one branch, by name
PREVIOUS, FIRST = "previous", "first"  # the last signal; the first block's residual at the last computed step


class GateRule(ABC):
    """One published rule; its thresholds and guards unless the settings give others. Holds no request's state."""

    name: ClassVar[str]
    signal: ClassVar[Signal]
    threshold: ClassVar[float]
    max_skip_steps: ClassVar[int] = 10_000
    accumulates: ClassVar[bool] = True  # the changes since the last computed step are summed
    mean: Split | None = None  # of a signal's absolute values; None: `mean_abs`

    def describe(self, latents: torch.Tensor, arguments: Mapping[str, Any], sigma: float) -> torch.Tensor:
        """What a `LATENTS` gate compares, made of a call's latents (rows, ...)."""
        return latents.clone()  # a pipeline may write the next ones into the same tensor

    def learn(self, memory: Memory, latents: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the rule needs to keep of a computed step's latents and output, by name."""
        return {}

    @abstractmethod
    def change(self, now: torch.Tensor, memory: Memory) -> torch.Tensor | None:
        """By how much each row has changed, shape (rows,); None if there is nothing to compare with."""


def comparable(memory: Memory, name: str, now: torch.Tensor) -> bool:
    """Whether `memory` holds something of that name with the shape of `now`."""
    return name in memory and memory[name].shape == now.shape


def relative_l1(now: torch.Tensor, before: torch.Tensor, mean: Split | None = None) -> torch.Tensor:
    """mean|now - before| / mean|before| of each row, in fp32."""
    mean = mean or mean_abs
    return mean(now.float() - before.float()) / mean(before).clamp_min(1e-12)


def mean_abs(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().flatten(1).mean(dim=1)


class GatedState(CacheState):
    """The state of one gated request: what its gate has seen, its residuals, and what it decided."""

    def __init__(
        self,
        rule: GateRule,
        settings: CacheSettings,
        schedule: Schedule,
        store: CacheStore,
    ) -> None:
        plan, config = settings.plan, settings.config
        assert isinstance(plan, GateSettings)
        self.rule, self._sigmas, self._switches = rule, schedule.sigmas, schedule.switches
        self._threshold = rule.threshold if plan.threshold is None else plan.threshold
        self._max_skips = rule.max_skip_steps if plan.max_skip_steps is None else plan.max_skip_steps
        self._begin = max(1, int(plan.retention_ratio * schedule.steps + 0.5))
        self._end = schedule.steps - 1 if config.compute_last_step else schedule.steps
        self._predictor = "reuse" if config.predictor == "auto" else config.predictor
        self._order = PREDICTORS[self._predictor][1]
        self._skips: dict[int, bool] = {}  # what was decided, by step
        self._error, self._last = 0.0, -1
        super().__init__(store, {"backend": rule.name, "threshold": self._threshold, "predictor": self._predictor})

    @property
    def _shows_first_block(self) -> bool:
        return self.rule.signal is Signal.FIRST_BLOCK

    # ------------------------------------------------------------------------------------------------------- deciding

    def signal(self, key: Key, step: int) -> Signal | None:
        if step >= self._end:
            wanted = False
        elif self._shows_first_block:  # every branch needs its own fresh first block if it skips
            wanted = self._begin <= step and self._skips.get(step, True)
        else:
            wanted = step not in self._skips and step >= self._begin - 1
        return self.rule.signal if wanted else None

    def describe(self, arguments: Mapping[str, Any], step: int) -> torch.Tensor:
        sigma = self._sigmas[step] if step < len(self._sigmas) else 0.0
        return self.rule.describe(latents_of(arguments), arguments, sigma)

    def change(self, key: Key, step: int, now: torch.Tensor) -> torch.Tensor | None:
        if step in self._skips or step < self._begin:
            return None
        change = self.rule.change(now, self._memory[key])
        return None if change is None else change.max()

    def decide(self, key: Key, step: int, now: torch.Tensor, change: float | None) -> None:
        """Skip or compute; a request without anything to compare computes. A NaN is a reason to compute."""
        self._memory[key].put(PREVIOUS, now)
        if step in self._skips:
            return
        skip = False
        if change is not None:
            self._error = self._error + change if self.rule.accumulates else change
            skip = self._error < self._threshold and step - self._last <= self._max_skips
        self._skips[step] = skip

    # --------------------------------------------------------------------------------------------- what every state has

    def forecast(self, key: Key, step: int, rows: int) -> Forecast | None:
        residuals = self._residuals.get(key)
        if not self._skips.get(step, False) or residuals is None:
            return None
        anchors = sorted(residuals)[-self._order :]
        if not anchors or any(len(residuals[a]) != rows for a in anchors):
            return None
        weights = PREDICTORS[self._predictor][0](anchors, step, self._sigmas, None).tolist()
        pairs = [(residuals[a], w) for a, w in zip(anchors, weights, strict=True) if w != 0.0]
        if self._shows_first_block:
            if PREVIOUS not in self._memory[key]:
                return None
            pairs.append((self._memory[key][PREVIOUS], 1.0))
        return pairs

    def wants(self, key: Key, step: int) -> bool:
        return step + 1 < self._end and step + self._order >= self._begin

    def prepare(self, key: Key, step: int, computed: Computed) -> Kept:
        """The residual, and what the rule keeps; a gate of the first block takes what the other blocks add."""
        if step >= self._end:
            return Kept()
        first = computed.first_residual() if self._shows_first_block else None
        if not self._shows_first_block:
            memory = self.rule.learn(self._memory[key], computed.latents, computed.output)
        else:
            memory = {} if first is None else {FIRST: first}
        if not self.wants(key, step) or (ends := computed.ends()) is None:
            return Kept(None, memory)
        after, before = ends
        if self._shows_first_block:
            assert first is not None
            before = before + first
        return Kept(ops.residual(after, before, self._store.dtype or after.dtype), memory)

    def commit(self, key: Key, step: int, kept: Kept | None) -> None:
        super().commit(key, step, kept)
        if step in self._switches:
            self._leave(key[0])
        memory, residuals = self._memory[key], self._residuals[key]
        if kept is not None:
            for name, tensor in kept.memory.items():
                memory.put(name, tensor)
            if kept.residual is not None and (FIRST in memory or not self._shows_first_block):
                residuals.put(step, kept.residual)
            self._last, self._error = step, 0.0
        if step + 1 >= self._end:
            residuals.clear()
            memory.clear()
        else:
            residuals.keep_only(sorted(residuals)[-self._order :].__contains__)
        if self._shows_first_block:
            memory.discard(PREVIOUS)

    def _leave(self, denoiser: str) -> None:
        """Give back what was kept of others: the first of two experts does not come again."""
        for kept in (self._residuals, self._memory):
            for key in [key for key in kept if key[0] != denoiser]:
                kept[key].clear()


class GateBackend(StackBackend):
    """A gate as a cache backend: `rule` is the gate's class; one with settings of its own overrides `make_rule`."""

    rule: ClassVar[type[GateRule]]

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        check_gate_config(self.name, config)

    def make_rule(self, config: DiffusionCacheConfig) -> GateRule:
        """The rule of a request with these settings."""
        return self.rule()

    def check(self, settings: CacheSettings, steps: int | None = None) -> None:
        check_gate_config(self.name, settings.config)
        self.make_rule(settings.config)

    def state(self, schedule: Schedule, settings: CacheSettings | None = None) -> CacheState:
        settings = settings or self.settings
        rule = self.make_rule(settings.config)
        if rule.signal is not Signal.LATENTS:  # each rank may see a part of it alone
            rule.mean = mean_of_all(next(iter(self.denoisers.values())).module, mean_abs)
        return GatedState(rule, settings, schedule, self.store)

    def _found(self, denoiser: Denoiser, model_name: str) -> None:
        """Refuse what the gate could not compare, before any request comes, if the denoiser is described."""
        name, spec = denoiser.name, denoiser.written
        if spec is not None and "hidden_states" not in spec.rows:
            raise InvalidValueError("cache_backend", self.name, f"cannot look at {name}, whose latents come as a list")
        if spec is not None and not self._sees(denoiser.module.get_submodule(f"{spec.stack[0].name}.0")):
            raise InvalidValueError("cache_backend", self.name, f"finds no attention in the blocks of {name}")

    def stack_for(self, name: str, arguments: Mapping[str, Any]) -> BlockStack | None:
        stack = super().stack_for(name, arguments)
        sees = isinstance(latents_of(arguments), torch.Tensor) and stack is not None and self._sees(stack.first_block)
        return stack if sees else None

    def _sees(self, block: torch.nn.Module) -> bool:
        return self.rule.signal is not Signal.MODULATED or first_attention(block) is not None


_CURVE = ("mag_ratios", "curve_resampling", "profile", "profile_insist", "mag_calibrate")
_PLANNED_ONLY = ("mag_threshold", *_CURVE, *PLANS)


def check_gate_config(name: str, config: DiffusionCacheConfig) -> None:
    """InvalidValueError for settings that a gate has no use for."""
    for field, value in config.given(*_PLANNED_ONLY).items():
        if field in config.model_fields_set and value not in (False, "auto"):
            raise InvalidValueError(field, value, f"belongs to a plan, {name} decides from data; leave it out")
    if config.predictor in NEED_GRAM:
        raise InvalidValueError("predictor", config.predictor, f"must be 'reuse' or 'linear' with {name}")
    if config.coefficients is not None and name != "teacache":
        raise InvalidValueError("coefficients", config.coefficients, "is a TeaCache setting; leave it out")
