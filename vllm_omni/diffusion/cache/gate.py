"""Gates: whether a step computes is decided from data, per request, before its forward. Knows no model.

A gate looks at one tensor per call (the latents, the first block's modulated input, or the first block's residual) and
says by how much it has changed. The comparison happens on the device; the changes of all requests of a batch come to
the host in one read. Everything else (residuals, predictors, budget) is what planned requests have.

A request decides once per step, at that step's first call, from the largest change over the call's own rows; all its
rows and guidance branches follow. No neighbour in the batch has a say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.cache.predictor import NEED_GRAM, PREDICTORS
from vllm_omni.diffusion.cache.request_cache import Forecast, Key
from vllm_omni.diffusion.cache.store import CacheStore, ResidualShelf, T
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops


class Look(Enum):
    """What a gate looks at: `LATENTS` need no forward, the others a probe of the embedding and (part of) one block."""

    LATENTS = "latents"
    MODULATED = "modulated"  # what the first block's attention gets
    FIRST_BLOCK = "first_block"  # what the first block adds


PREVIOUS, INPUT, OUTPUT, RATE, FIRST = range(5)  # a gate's memory: of the last look, of the last computed step


class Gate(ABC):
    """One published rule; its thresholds and guards where the settings give none. Holds no request's state."""

    name: ClassVar[str]
    look: ClassVar[Look]
    threshold: ClassVar[float]
    max_skip_steps: ClassVar[int] = 10_000
    accumulates: ClassVar[bool] = True  # the changes since the last computed step are summed

    def describe(self, latents: torch.Tensor, arguments: Mapping[str, Any], sigma: float) -> torch.Tensor:
        """What a `LATENTS` gate compares, made of a call's latents (rows, ...)."""
        return latents

    def learn(self, seen: ResidualShelf, latents: torch.Tensor, output: torch.Tensor) -> None:  # noqa: B027 - most need not
        """Take in a computed step's latents and output, where the rule needs them."""

    @abstractmethod
    def change(self, now: torch.Tensor, seen: ResidualShelf) -> torch.Tensor | None:
        """By how much each row has changed, shape (rows,); None where there is nothing to compare with."""


def keep(seen: ResidualShelf, slot: int, value: torch.Tensor) -> None:
    """Put `value` in the place of what `slot` held, if the budget allows."""
    seen.discard(slot)
    seen.put(slot, value)


def comparable(seen: ResidualShelf, slot: int, now: torch.Tensor) -> bool:
    return slot in seen and seen[slot].shape == now.shape


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """mean|now - before| / mean|before| of each row, in fp32."""
    return mean_abs(now.float() - before.float()) / mean_abs(before).clamp_min(1e-12)


def mean_abs(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().flatten(1).mean(dim=1)


class GateCache:
    """The state of one gated request: what its gate has seen, its residuals, and what it decided."""

    plan = None

    def __init__(
        self,
        gate: Gate,
        config: DiffusionCacheConfig,
        steps: int,
        sigmas: tuple[float, ...],
        store: CacheStore,
        kept_as: torch.dtype | None = None,
    ) -> None:
        self.gate, self._sigmas, self._store, self._kept_as = gate, sigmas, store, kept_as
        given = config.model_fields_set
        self._threshold = config.rel_l1_thresh if config.rel_l1_thresh is not None else gate.threshold
        self._max_skips = config.mag_max_skip_steps if "mag_max_skip_steps" in given else gate.max_skip_steps
        self._begin = max(1, int(config.mag_retention_ratio * steps + 0.5))
        self._end = steps - 1 if config.compute_last_step else steps
        self._predictor = "reuse" if config.predictor == "auto" else config.predictor
        self._order = PREDICTORS[self._predictor][1]
        self._residuals: dict[Key, ResidualShelf[ops.Residual]] = {}
        self._seen: dict[Key, ResidualShelf[torch.Tensor]] = {}
        self._decided: dict[int, bool] = {}  # step -> skip
        self._error, self._last = 0.0, -1
        self._computed: set[int] = set()
        self._skipped: set[int] = set()
        self.changes: dict[int, float] = {}  # what each decision was taken from

    def sigma(self, step: int) -> float:
        return self._sigmas[step] if step < len(self._sigmas) else 0.0

    @property
    def settings(self) -> dict[str, object]:
        return {"backend": self.gate.name, "threshold": self._threshold, "predictor": self._predictor}

    # ------------------------------------------------------------------------------------------------------- deciding

    def wants_look(self, key: Key, step: int) -> bool:
        """Whether this call must be looked at before it can run."""
        if step >= self._end:
            return False
        if self.gate.look is Look.FIRST_BLOCK:  # every branch needs its own fresh first block where it skips
            return self._begin <= step and self._decided.get(step, True)
        return step not in self._decided and step >= self._begin - 1

    def looked(self, key: Key, step: int, now: torch.Tensor) -> torch.Tensor | None:
        """Take in what this call shows; the change as a scalar on the device where a decision hangs on it."""
        seen = self._shelf(self._seen, key)
        change = None
        if step not in self._decided:
            change = self.gate.change(now, seen)
        if step < self._begin:
            change = None
        keep(seen, PREVIOUS, now)
        return None if change is None else change.max()

    def decide(self, step: int, change: float | None) -> None:
        """Skip or compute; a request without anything to compare computes. A NaN is a reason to compute."""
        if step in self._decided:
            return
        skip = False
        if change is not None:
            self.changes[step] = change
            self._error = self._error + change if self.gate.accumulates else change
            skip = self._error < self._threshold and step - self._last <= self._max_skips
        self._decided[step] = skip

    # ------------------------------------------------------------------------------------------ what every record has

    def forecast(self, key: Key, step: int, rows: int) -> Forecast | None:
        shelf = self._residuals.get(key)
        if not self._decided.get(step, False) or shelf is None:
            return None
        anchors = shelf.steps()[-self._order :]
        if not anchors or any(len(shelf[a]) != rows for a in anchors):
            return None
        weights = PREDICTORS[self._predictor][0](anchors, step, self._sigmas, None).tolist()
        pairs = [(shelf[a], w) for a, w in zip(anchors, weights, strict=True) if w != 0.0]
        if self.gate.look is Look.FIRST_BLOCK:
            if PREVIOUS not in self._seen[key]:
                return None
            pairs.append((self._seen[key][PREVIOUS], 1.0))
        return pairs

    def wants(self, key: Key, step: int) -> bool:
        return step + 1 < self._end and step + self._order >= self._begin

    def learn(
        self, key: Key, step: int, latents: torch.Tensor, output: torch.Tensor, first: torch.Tensor | None
    ) -> None:
        """After a computed forward, before `put`: the call's own rows of latents, output and first block's residual."""
        if step >= self._end:
            return
        seen = self._shelf(self._seen, key)
        if self.gate.look is not Look.FIRST_BLOCK:
            self.gate.learn(seen, latents, output)
        elif first is not None:
            keep(seen, FIRST, first)

    def put(self, key: Key, step: int, after: torch.Tensor, before: torch.Tensor) -> None:
        if self.gate.look is Look.FIRST_BLOCK:
            seen = self._shelf(self._seen, key)
            if FIRST not in seen:
                return
            before = before + seen[FIRST]
        residual = ops.residual(after, before, self._kept_as or after.dtype)
        self._shelf(self._residuals, key).put(step, residual)

    def did(self, key: Key, step: int, computed: bool) -> None:
        if computed:
            self._computed.add(step)
            self._last, self._error = step, 0.0
        else:
            self._skipped.add(step)
        shelf = self._residuals.get(key)
        if step + 1 >= self._end:
            if shelf is not None:
                shelf.keep_only(frozenset())
            self._shelf(self._seen, key).keep_only(frozenset())
        elif shelf is not None:
            shelf.keep_only(frozenset(shelf.steps()[-self._order :]))
        if self.gate.look is Look.FIRST_BLOCK and key in self._seen:
            self._seen[key].discard(PREVIOUS)

    def drop(self) -> None:
        shelves: list[ResidualShelf[Any]] = [*self._residuals.values(), *self._seen.values()]
        for shelf in shelves:
            shelf.keep_only(frozenset())
        self._residuals.clear()
        self._seen.clear()

    @property
    def computed_steps(self) -> int:
        return len(self._computed)

    @property
    def skipped_steps(self) -> int:
        return len(self._skipped - self._computed)

    def _shelf(self, shelves: dict[Key, ResidualShelf[T]], key: Key) -> ResidualShelf[T]:
        if key not in shelves:
            shelves[key] = ResidualShelf(self._store)
        return shelves[key]


Looked = tuple[GateCache, Key, int, torch.Tensor]


def decide(looked: Sequence[Looked]) -> None:
    """The decisions of many requests at the price of one device read; none where no decision hangs on data."""
    changes = [cache.looked(key, step, now) for cache, key, step, now in looked]
    known = [change for change in changes if change is not None]
    values = iter(torch.stack(known).tolist() if known else ())
    for (cache, _, step, _), change in zip(looked, changes, strict=True):
        cache.decide(step, None if change is None else next(values))


_PLANNED_ONLY = (
    "preset",
    "mag_threshold",
    "mag_ratios",
    "steps_mask",
    "nfe",
    "speedup",
    "seconds",
    "profile",
    "profile_insist",
    "mag_calibrate",
)


def check_gate_config(name: str, config: DiffusionCacheConfig) -> None:
    """InvalidValueError for settings that a gate has no use for."""
    for field in _PLANNED_ONLY:
        value = vars(config)[field]
        if field in config.model_fields_set and value not in (None, False, "auto"):
            raise InvalidValueError(field, value, f"belongs to a plan, {name} decides from data; leave it out")
    if config.predictor in (*NEED_GRAM, "gamma"):
        allowed = ", ".join(map(repr, ("reuse", "linear", "damped")))
        raise InvalidValueError("predictor", config.predictor, f"must be one of {allowed} with {name}")
    if config.coefficients is not None and name != "teacache":
        raise InvalidValueError("coefficients", config.coefficients, "is a TeaCache setting; leave it out")
