"""One request's cache: its plan, its forecasts, its residuals. Made at its first step, dropped when it ends.

Host-side bookkeeping only: deciding looks at integers, never at a tensor's values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_omni.diffusion.cache.plan import Plan
from vllm_omni.diffusion.cache.predictor import Terms
from vllm_omni.diffusion.cache.store import CacheStore, ResidualShelf
from vllm_omni.kernels import ops

Key = tuple[str, str]  # (denoiser, branch)
Forecast = list[tuple[ops.Residual, float]]  # residuals (rows, tokens, channels) and their weights


@dataclass(frozen=True)
class CachePlan:
    """What a request will do at each step, known before its first: compute or forecast, and what it keeps for that."""

    compute: Plan
    terms: dict[int, Terms] = field(default_factory=dict)
    needed_after: tuple[frozenset[int], ...] = ()

    @classmethod
    def of(cls, compute: Plan, terms: dict[int, Terms]) -> CachePlan:
        needed: list[frozenset[int]] = []
        later: frozenset[int] = frozenset()
        for step in range(len(compute) - 1, -1, -1):
            needed.append(later)
            later |= {anchor for anchor, _ in terms.get(step, ())}
        return cls(compute, terms, tuple(reversed(needed)))

    @property
    def full_forwards(self) -> int:
        return sum(self.compute)


class RequestCache:
    """The state of one request; residuals are keyed by denoiser, branch and step, and never leave it."""

    def __init__(
        self, plan: CachePlan, store: CacheStore, settings: dict[str, object], dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` is what residuals are kept in; None is the model's own."""
        self._plan = plan
        self._dtype = dtype
        self._settings = settings
        self._store = store
        self._shelves: dict[Key, ResidualShelf[ops.Residual]] = {}
        self._refused: set[int] = set()
        self._computed: set[int] = set()
        self._skipped: set[int] = set()

    @property
    def plan(self) -> CachePlan:
        return self._plan

    @property
    def settings(self) -> dict[str, object]:
        return self._settings

    def forecast(self, key: Key, step: int, rows: int) -> Forecast | None:
        """The (residual, weight) pairs that stand in for the blocks at `step`, or None: compute.

        None too where a residual the plan counts on is missing (no room in the budget, a branch that began late) or
        where the call has another number of rows than it had.
        """
        terms = self.plan.terms.get(step)
        shelf = self._shelves.get(key)
        if terms is None or shelf is None or any(anchor not in shelf for anchor, _ in terms):
            return None
        pairs = [(shelf[anchor], weight) for anchor, weight in terms]
        return None if any(len(residual) != rows for residual, _ in pairs) else pairs

    def wants(self, key: Key, step: int) -> bool:
        """Whether the residual of a computed `step` is worth taking."""
        return step < len(self.plan.needed_after) and step in self.plan.needed_after[step]

    def put(self, key: Key, step: int, after: torch.Tensor, before: torch.Tensor) -> None:
        """Keep the residual after - before. Where one branch finds no room, all compute: the decision is joint."""
        if step in self._refused:
            return
        residual = ops.residual(after, before, self._dtype or after.dtype)
        if key not in self._shelves:
            self._shelves[key] = ResidualShelf(self._store)
        if not self._shelves[key].put(step, residual):
            self._refused.add(step)
            for shelf in self._shelves.values():
                shelf.discard(step)

    def did(self, key: Key, step: int, computed: bool) -> None:
        """Note what was done at `step`, and drop what no later step needs."""
        (self._computed if computed else self._skipped).add(step)
        if key in self._shelves:
            needed = self.plan.needed_after[step] if step < len(self.plan.needed_after) else frozenset()
            self._shelves[key].keep_only(needed)

    def drop(self) -> None:
        """Give every byte back."""
        for shelf in self._shelves.values():
            shelf.keep_only(frozenset())
        self._shelves.clear()

    @property
    def computed_steps(self) -> int:
        return len(self._computed)

    @property
    def skipped_steps(self) -> int:
        return len(self._skipped - self._computed)
