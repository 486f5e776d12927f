"""Bytes: who holds how much cache memory, against one budget. Knows no plan and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch


class Held(Protocol):
    """A tensor, or what is made of some."""

    @property
    def nbytes(self) -> int: ...


K = TypeVar("K")
T = TypeVar("T", bound=Held)


class CacheStore:
    """Counts the bytes of all buffers alive, a tensor's as `counted` says; `budget` None is no limit.

    `dtype` is what residuals are kept in, None the model's own.
    """

    def __init__(self, budget: int | None = None, dtype: torch.dtype | None = None) -> None:
        self.budget, self.dtype = budget, dtype
        self.counted: Callable[[int], int] = int
        self.used = 0
        self.peak = 0

    def take(self, nbytes: int) -> bool:
        """Reserve `nbytes`; False, and nothing reserved, if the budget has no room."""
        if self.budget is not None and self.used + nbytes > self.budget:
            return False
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return True

    def give_back(self, nbytes: int) -> None:
        self.used -= nbytes


class Buffer(Mapping[K, T], Generic[K, T]):
    """Tensors of one (request, denoiser, branch), by step or by name. Rows of a request's call stay together."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._tensors: dict[K, T] = {}
        self._nbytes: dict[K, int] = {}

    def __getitem__(self, key: K) -> T:
        return self._tensors[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def put(self, key: K, tensor: T) -> bool:
        """Keep `tensor` in the place of what `key` held; False, and the place is empty, if the budget has no room."""
        self.discard(key)
        if not self._store.take(nbytes := self._store.counted(tensor.nbytes)):
            return False
        self._tensors[key], self._nbytes[key] = tensor, nbytes
        return True

    def keep_only(self, wanted: Callable[[Any], bool]) -> None:
        """Drop every tensor whose key is not `wanted`."""
        for key in [k for k in self._tensors if not wanted(k)]:
            self.discard(key)

    def discard(self, key: K) -> None:
        if self._tensors.pop(key, None) is not None:
            self._store.give_back(self._nbytes.pop(key))

    def clear(self) -> None:
        """Give every byte back."""
        self.keep_only(lambda key: False)
