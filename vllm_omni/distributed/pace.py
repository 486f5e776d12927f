"""What rank 0 has measured, as all ranks know it: a budget in seconds becomes the same plan on each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from vllm_omni.kernels.timing import Average, Pace, SizeClass


class GroupPace(Pace):
    """Measures on, and knows what was told at the beginning of the turn."""

    def __init__(self) -> None:
        super().__init__()
        self._told = Pace()
        self._last: dict[Hashable, tuple[Any, ...]] = {}

    def known(self, size: Hashable) -> SizeClass | None:
        return self._told.known(size)

    def news(self) -> list[tuple[Any, ...]]:
        """What has changed since it was last asked for; for `learn`, here and on every other rank."""
        now = {size: _plain(known) for size, known in self._sizes.items()}
        changed = [(size, *values) for size, values in now.items() if self._last.get(size) != values]
        self._last = now
        return changed

    def learn(self, told: Iterable[tuple[Any, ...]]) -> None:
        """Take over what rank 0 has measured."""
        for size, *averages in told:
            known = self._told._of(_hashable(size))
            known.computed, known.skipped, known.coding = (Average(*average) for average in averages)


def _plain(known: SizeClass) -> tuple[Any, ...]:
    return tuple((one.seconds, one.count) for one in (known.computed, known.skipped, known.coding))


def _hashable(value: Any) -> Any:
    """What was a tuple before it was sent."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
