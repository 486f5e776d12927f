"""How long work will take: moving averages of what the same work took lately. Pure numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_omni.engine.wire import UnitCosts

UNKNOWN_ROW_S = 1.0  # a row of a computed forward nobody has measured yet
_SHARE_SKIPPED = 0.1  # of a computed row, as long as no skipped one has been measured
_KEPT_SIZES = 64
_WEIGHT = 0.1  # of a request's measurement
_ROW_WEIGHT = 0.02  # of a row's
UNKNOWN_UNSHARED = 0.7  # of a row in company, as long as all forwards had the same number of rows
_LINE_KEPT = 0.995  # of what a line knows, at each further forward
_ROWS_VARY = 0.05  # the variance of rows from which a line has a slope


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


@dataclass
class RowLine:
    """Seconds of a forward as a line over its rows, by least squares in which old forwards fade.

    What a forward costs however many share it, and what each row adds: a router must know both, and a mean per row
    knows neither.
    """

    forwards: float = 0.0
    rows: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0

    def note(self, rows: int, seconds: float) -> None:
        """One more forward."""
        self.forwards = _LINE_KEPT * self.forwards + 1
        self.rows = _LINE_KEPT * self.rows + rows
        self.squares = _LINE_KEPT * self.squares + rows * rows
        self.seconds = _LINE_KEPT * self.seconds + seconds
        self.products = _LINE_KEPT * self.products + rows * seconds

    def fit(self) -> tuple[float, float]:
        """(seconds of a row by itself, the share of it that a row costs in company)."""
        rows, seconds = self.rows / self.forwards, self.seconds / self.forwards
        variance = self.squares / self.forwards - rows * rows
        if variance < _ROWS_VARY:  # through the one point that is known
            return seconds / (1 + UNKNOWN_UNSHARED * (rows - 1)), UNKNOWN_UNSHARED
        slope = (self.products / self.forwards - rows * seconds) / variance
        slope = min(max(slope, 0.0), seconds / rows)  # neither falls nor begins below nothing
        alone = seconds + slope * (1 - rows)
        return alone, slope / alone if alone > 0 else UNKNOWN_UNSHARED


def note_line(lines: dict[int, RowLine], costs: UnitCosts, pixels: int, rows: int, seconds: float) -> None:
    """One more computed forward of pictures of `pixels`; `costs` gets what the lines know by now."""
    line = lines.pop(pixels, None) or RowLine()
    line.note(rows, seconds)
    lines[pixels] = line
    while len(lines) > _KEPT_SIZES:
        del lines[next(iter(lines))]
    costs.alone[pixels], costs.unshared_of[pixels] = line.fit()
    if line.forwards >= max(one.forwards for one in lines.values()):  # the size that is best known speaks for all
        costs.unshared = costs.unshared_of[pixels]
    for known in costs.alone.keys() - lines.keys():
        del costs.alone[known]
        costs.unshared_of.pop(known, None)


def by_itself(costs: UnitCosts) -> UnitCosts:
    """The same costs, of rows that share their forward with no other."""
    return UnitCosts(costs.computed | costs.alone, costs.skipped, costs.ends, costs.cached_share)


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
