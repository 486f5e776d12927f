"""How long work will take: moving averages of what the same work took lately. Pure numbers."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_omni.engine.wire import UnitCosts

UNKNOWN_ROW_S = 1.0  # a row of a computed forward nobody has measured yet
_SHARE_SKIPPED = 0.1  # of a computed row, as long as no skipped one has been measured
_KEPT_SIZES = 64
_WEIGHT = 0.1  # of a request's measurement
_ROW_WEIGHT = 0.02  # of a row's


def no_costs() -> UnitCosts:
    """Before anything was measured."""
    return UnitCosts({}, {}, {}, 1.0)


def note(table: dict[int, float], pixels: int, seconds: float, weight: float = _WEIGHT) -> None:
    """One more measurement of `seconds` for pictures of `pixels`."""
    old = table.pop(pixels, None)
    table[pixels] = seconds if old is None else old + weight * (seconds - old)
    while len(table) > _KEPT_SIZES:  # sizes are the clients' choice
        del table[next(iter(table))]


def note_rows(table: dict[int, float], pixels: int, seconds: float, rows: int) -> None:
    """A forward of so many `rows`. Each counts alike: a row of a small batch costs more, and there are few of them."""
    note(table, pixels, seconds / rows, 1.0 - (1.0 - _ROW_WEIGHT) ** rows)


def note_share(costs: UnitCosts, computed: int, skipped: int) -> None:
    """How many of its steps a request with a cache computed."""
    if computed + skipped:
        costs.cached_share += _WEIGHT * (computed / (computed + skipped) - costs.cached_share)


def seconds_per(table: dict[int, float], pixels: int, unknown: float) -> float:
    """Of one unit at `pixels`: measured, or in proportion to the nearest size that was, or `unknown`."""
    if pixels in table:
        return table[pixels]
    if not table:
        return unknown
    nearest = min(table, key=lambda known: abs(known - pixels))
    return table[nearest] * (pixels / nearest if nearest and pixels else 1.0)


def planned_seconds(costs: UnitCosts, pixels: int, computed: float, skipped: float, ends: float = 1.0) -> float:
    """Of a request that still needs so many rows computed and skipped, and `ends` (1: encoding and decoding)."""
    row = seconds_per(costs.computed, pixels, UNKNOWN_ROW_S)
    cheap = seconds_per(costs.skipped, pixels, row * _SHARE_SKIPPED)
    return computed * row + skipped * cheap + ends * seconds_per(costs.ends, pixels, 0.0)


def come_back(now: float, promised: float, each: float, queued: float) -> float:
    """When the next of those sent away should come back, in the clock of `now`.

    A place frees every `each` seconds, so they are told one place after another (`promised` is the last one's), and
    nobody later than when all that is queued (`queued` seconds) is done: no herd comes back at once.
    """
    return min(max(now, promised) + each, now + max(queued, each))


def total(costs: UnitCosts, needs: Iterable[tuple[int, float, float, float]]) -> float:
    """Seconds of several (pixels, computed rows, skipped rows, ends)."""
    return sum(planned_seconds(costs, *need) for need in needs)
