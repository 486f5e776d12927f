"""Bytes: who holds how much residual memory, against one budget. Knows no plan and no model."""

from __future__ import annotations

from typing import Generic, TypeVar

from vllm_omni.kernels.ops import Residual

T = TypeVar("T", bound=Residual)


class CacheStore:
    """Counts the bytes of all residuals alive; `budget` None is no limit."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.used = 0
        self.peak = 0

    def take(self, nbytes: int) -> bool:
        """Reserve `nbytes`; False, and nothing reserved, where the budget has no room."""
        if self.budget is not None and self.used + nbytes > self.budget:
            return False
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return True

    def give_back(self, nbytes: int) -> None:
        self.used -= nbytes


class ResidualShelf(Generic[T]):
    """The residuals of one (request, denoiser, branch), by step. Rows of a request's call stay together."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._residuals: dict[int, T] = {}

    def __contains__(self, step: int) -> bool:
        return step in self._residuals

    def __getitem__(self, step: int) -> T:
        return self._residuals[step]

    def steps(self) -> list[int]:
        """The steps it holds a residual of, in ascending order."""
        return sorted(self._residuals)

    def put(self, step: int, residual: T) -> bool:
        """Keep it, if the budget allows."""
        if not self._store.take(residual.nbytes):
            return False
        self._residuals[step] = residual
        return True

    def keep_only(self, steps: frozenset[int]) -> None:
        """Drop every residual that no later step will ask for."""
        for step in [s for s in self._residuals if s not in steps]:
            self.discard(step)

    def discard(self, step: int) -> None:
        if (residual := self._residuals.pop(step, None)) is not None:
            self._store.give_back(residual.nbytes)
