"""One request's cache: what it keeps, and what it has done. Made at its first step, dropped when it ends.

A state changes in `decide` and `commit`, both host-side bookkeeping that cannot fail, and both called after everything
that can fail has succeeded: a forward that raises leaves every request as it was. `follow` forgets before a forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch

from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.store import Buffer, CacheStore
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.rows import latents_of, made_of_rows, take_rows
from vllm_omni.kernels import ops, promise
from vllm_omni.nested import tensors_in

Key = tuple[str, str]  # (denoiser, branch)
_NONE_NEEDED: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Output:
    """What a denoiser has returned of one request's rows: a tensor, a list of them, several streams."""

    value: Any
    rows: int

    def __len__(self) -> int:
        return self.rows

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_in(self.value))


# Residuals (rows, tokens, channels) to add in place of the blocks, or outputs to sum in place of the denoiser.
Forecast = list[tuple[ops.Residual | Output, float]]


class Signal(Enum):
    """What a gate compares: the latents need no forward, the others a probe of the embedding and (part of) a block."""

    LATENTS = "latents"
    MODULATED = "modulated"  # what the first block's attention gets
    FIRST_BLOCK = "first_block"  # what the first block adds


@dataclass(frozen=True)
class Computed:
    """What a computed forward shows of one request's rows."""

    stack: BlockStack | None  # None unless the forward was tapped
    rows: slice
    latents: Any
    result: Any
    elsewhere: bool = False  # made on another rank

    @property
    def output(self) -> torch.Tensor:
        return tensors_in(self.result)[0][self.rows]

    @property
    def is_of_rows(self) -> bool:
        """Whether the result has a row for each of the latents', and nothing else: no memory of the model's own."""
        return made_of_rows(self.result) and made_of_rows(take_rows(self.result, self.rows), len(self.latents))

    def whole_output(self) -> Output | None:
        """A copy of all that was returned of these rows; None if it is something else than rows."""
        if self.elsewhere or not self.is_of_rows:
            return None
        return Output(promise.mapped(torch.Tensor.clone, take_rows(self.result, self.rows)), len(self.latents))

    def ends(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(after, before) the blocks."""
        return self.stack.ends(self.rows) if self.stack is not None else None

    def first_residual(self) -> torch.Tensor | None:
        """out - in of the first block."""
        return self.stack.first_residual(self.rows) if self.stack is not None else None


class Kept(NamedTuple):
    """Tensors of a computed step that later steps will need."""

    residual: ops.Residual | Output | None = None
    memory: Mapping[str, torch.Tensor] = {}


class CacheState:
    """The state of a request without a cache: every step computes, and nothing is kept."""

    plan: CachePlan | None = None

    def __init__(self, store: CacheStore | None = None, settings: Mapping[str, object] | None = None) -> None:
        """`settings` is what the output reports of the cache; None without one."""
        self.settings = settings
        self._store = store or CacheStore()
        self._residuals: defaultdict[Key, Buffer[int, ops.Residual | Output]] = defaultdict(
            partial(Buffer, self._store)
        )
        self._memory: defaultdict[Key, Buffer[str, torch.Tensor]] = defaultdict(partial(Buffer, self._store))
        self._shapes: dict[Key, object] = {}  # of each branch's latents
        self._computed: set[int] = set()
        self._skipped: set[int] = set()

    def follow(self, key: Key, latents: Any) -> None:
        """Forget what was kept of latents of another shape: FLUX.2 klein sends its reference tokens once."""
        shape = latents.shape if isinstance(latents, torch.Tensor) else [entry.shape for entry in latents]
        if self._shapes.setdefault(key, shape) != shape:
            self._shapes[key] = shape
            self.forget(key)

    def forget(self, key: Key) -> None:
        """Give back a branch's residuals."""
        self._residuals[key].clear()

    def signal(self, key: Key, step: int) -> Signal | None:
        """What must be seen of this call before its step can be decided; None: nothing."""
        return None

    def describe(self, arguments: Mapping[str, Any], step: int) -> torch.Tensor:
        """What a gate compares of a call's latents, (rows, ...); asked for `Signal.LATENTS` alone."""
        return latents_of(arguments)

    def change(self, key: Key, step: int, now: torch.Tensor) -> torch.Tensor | None:
        """By how much a signal has changed, as a scalar on the device; None if no decision hangs on it."""
        return None

    def decide(self, key: Key, step: int, now: torch.Tensor, change: float | None) -> None:
        """Take in a call's signal `now` and its change, and decide the step unless it is decided."""

    def forecast(self, key: Key, step: int, rows: int) -> Forecast | None:
        """The (residual, weight) pairs that stand in for the blocks at `step`; None: compute."""
        return None

    def wants(self, key: Key, step: int) -> bool:
        """Whether the residual of a computed `step` is worth taking."""
        return False

    def prepare(self, key: Key, step: int, computed: Computed) -> Kept:
        """The tensors that a computed step leaves; nothing is kept before `commit`."""
        return Kept()

    def commit(self, key: Key, step: int, kept: Kept | None) -> None:
        """Note what was done at `step`: computed, leaving `kept`, or (None) skipped."""
        (self._skipped if kept is None else self._computed).add(step)

    def observe(self, step: int, model_output: Any, sample: Any) -> None:
        """Look at what the scheduler got at the end of a step: the output of all branches as guidance joins them."""

    def drop(self) -> None:
        """Give every byte back."""
        for residuals in self._residuals.values():
            residuals.clear()
        for memory in self._memory.values():
            memory.clear()
        self._residuals.clear()
        self._memory.clear()

    @property
    def computed_steps(self) -> int:
        return len(self._computed)

    @property
    def skipped_steps(self) -> int:
        return len(self._skipped - self._computed)


class PlannedState(CacheState):
    """The state of a request whose plan is known before its first step: deciding looks at integers alone."""

    plan: CachePlan

    def __init__(self, plan: CachePlan, store: CacheStore, settings: Mapping[str, object]) -> None:
        super().__init__(store, settings)
        self.plan = plan
        self._refused: set[int] = set()

    def forecast(self, key: Key, step: int, rows: int) -> Forecast | None:
        """As planned; None too if a residual the plan counts on is missing, or has another number of rows.

        A residual is missing if the budget had no room for it, or if its branch began late.
        """
        terms = self.plan.terms.get(step)
        residuals = self._residuals.get(key)
        if terms is None or residuals is None or any(anchor not in residuals for anchor, _ in terms):
            return None
        if not terms and self.plan.forecasts == "output":  # all weights are zero
            return None
        pairs = [(residuals[anchor], weight) for anchor, weight in terms]
        return None if any(len(residual) != rows for residual, _ in pairs) else pairs

    def wants(self, key: Key, step: int) -> bool:
        return self.plan.forecasts == "residual" and step in self._needed_after(step)

    def prepare(self, key: Key, step: int, computed: Computed) -> Kept:
        if step not in self._needed_after(step) or step in self._refused:
            return Kept()
        if self.plan.forecasts == "output":
            return Kept(computed.whole_output())
        if (ends := computed.ends()) is None:
            return Kept()
        after, before = ends
        return Kept(ops.residual(after, before, self._store.dtype or after.dtype))

    def commit(self, key: Key, step: int, kept: Kept | None) -> None:
        """Also drop what no later step needs. If one branch finds no room, all compute: the decision is joint."""
        super().commit(key, step, kept)
        if kept is not None and kept.residual is not None and step not in self._refused:
            self._keep(key, step, kept.residual)
        needed = self._needed_after(step)
        for other, residuals in self._residuals.items():  # a branch may end before the run, as an expert's does
            residuals.keep_only((needed if other == key else needed | self._needed_after(step - 1)).__contains__)

    def _keep(self, key: Key, step: int, residual: ops.Residual | Output) -> None:
        if not self._residuals[key].put(step, residual):
            self._refused.add(step)
            for residuals in self._residuals.values():
                residuals.discard(step)

    def _needed_after(self, step: int) -> frozenset[int]:
        return self.plan.needed_after[step] if 0 <= step < len(self.plan.needed_after) else _NONE_NEEDED
