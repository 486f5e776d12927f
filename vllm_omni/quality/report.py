"""What the rows say: a table, margins over the other methods against the bars, and the default preset. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_omni.quality.bench import Result
from vllm_omni.quality.peers import PEERS
from vllm_omni.quality.rows import FEWER, PLANNED, PROMISES, RULE

WORST_DB = 30.0  # of the default preset's worst pair
OVER_RULE = {2.0: 9.0, 3.0: 10.0, 4.0: 7.0}  # dB above MagCache's plain reuse, by speed-up
OVER_FEWER = {2.0: 8.0, 2.5: 7.0, 3.0: 7.0}  # dB above an uncached run of as many steps, by speed-up;
ELSEWHERE, OVER_PEERS = 5.0, 3.0  # at the others, and above each peer, from LEAST to MOST times
LEAST, MOST = 1.3, 4.0


@dataclass(frozen=True)
class Margin:
    """Our mean PSNR less another method's, in dB, and whether that reaches the bar."""

    steps: int
    times: float
    ours: str
    over: str
    ours_db: float
    over_db: float
    bar_db: float

    @property
    def margin_db(self) -> float:
        return self.ours_db - self.over_db

    @property
    def reached(self) -> bool:
        return self.margin_db >= self.bar_db


def mean(result: Result, metric: str = "psnr") -> float:
    return statistics.fmean(result.metrics[metric])


def worst(result: Result, metric: str = "psnr") -> float:
    """The worst pair: the highest LPIPS, the lowest of the others."""
    return (max if metric == "lpips" else min)(result.metrics[metric])


def margins(results: Sequence[Result]) -> list[Margin]:
    """Our best planned setting at each speed-up against the published rule and fewer steps at equal full forwards,
    and against each peer at equal block work, by interpolation of the peer's curve.
    """
    found = []
    for steps in sorted({result.row.steps for result in results}):
        here = [result for result in results if result.row.steps == steps]
        ours = _best_by_work(r for r in here if r.row.group == PLANNED or r.row.group.startswith(f"{PLANNED},"))
        for best in ours:
            promise = min(PROMISES, key=lambda p: abs(p - best.times_ideal))
            for other in (r for r in here if abs(r.nfe - best.nfe) < 0.5):
                if other.row.group == RULE and promise in OVER_RULE:
                    found.append(_margin(best, promise, other.row.group, mean(other), OVER_RULE[promise]))
                elif other.row.group == FEWER and LEAST <= promise <= MOST:
                    found.append(_margin(best, promise, FEWER, mean(other), OVER_FEWER.get(promise, ELSEWHERE)))
            if not LEAST <= promise <= MOST:
                continue
            for peer in PEERS:
                at = interpolate([r for r in here if r.row.peer == peer], best.work)
                if at is not None:
                    found.append(_margin(best, promise, peer, at, OVER_PEERS))
    return sorted(found, key=lambda m: (m.steps, m.times, m.over))


def best_peers(found: Iterable[Margin]) -> list[Margin]:
    """Of the margins over peers, the smallest at each speed-up: what the bar is about."""
    least: dict[tuple[int, float], Margin] = {}
    for margin in (m for m in found if m.over in PEERS):
        key = (margin.steps, margin.times)
        if key not in least or margin.margin_db < least[key].margin_db:
            least[key] = margin
    return [least[key] for key in sorted(least)]


def interpolate(points: Sequence[Result], work: float) -> float | None:
    """A method's mean PSNR at this block work: linear in log work between its points.

    Below its least work its fastest point stands in, which flatters it. Thresholds land near a target, not on it: up to
    5 % above its most work the last line goes on; beyond, nothing can be said: None.
    """
    known = sorted((np.log(point.work), mean(point)) for point in points)
    if not known or np.log(work) > known[-1][0] + np.log(1.05):
        return None
    if np.log(work) > known[-1][0] and len(known) > 1:
        (w0, db0), (w1, db1) = known[-2:]
        return float(db1 + (np.log(work) - w1) * (db1 - db0) / (w1 - w0))
    return float(np.interp(np.log(work), [w for w, _ in known], [db for _, db in known]))


def default_preset(results: Sequence[Result]) -> dict[str, Any] | None:
    """The largest planned speed-up whose worst pair stays above the limit at every step count of the report, and whose
    mean is above that of as many steps without a cache.
    """
    counts = {result.row.steps for result in results}
    planned = [result for result in results if result.row.group == PLANNED]
    control = {(r.row.steps, round(r.nfe)): mean(r) for r in results if r.row.group == FEWER}
    for promise in sorted(PROMISES, reverse=True):
        at = [r for r in planned if r.row.request_cache == {"speedup": promise}]
        if {r.row.steps for r in at} == counts and all(worst(r) >= WORST_DB for r in at):
            if any(mean(r) <= control.get((r.row.steps, round(r.nfe)), 0.0) for r in at):
                continue
            lows = {r.row.steps: round(worst(r), 2) for r in at}
            return {"speedup": promise, "worst_db": lows, "limit_db": WORST_DB, "scanned": list(PROMISES)}
    return None


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every row with its pairs' values."""
    return [
        asdict(result.row)
        | {
            "nfe": round(result.nfe, 3),
            "block_work": round(result.work, 3),
            "times_ideal": round(result.times_ideal, 3),
            "times_measured": result.times_measured,
            "mean": {name: round(mean(result, name), 4) for name in result.metrics},
            "worst": {name: round(worst(result, name), 4) for name in result.metrics},
            "pairs": result.metrics,
            "seconds": round(result.seconds, 2),
        }
        for result in results
    ]


Lines = list[list[str]]
_WORDS = ("setting", "our setting", "over", "")  # columns of text; the others are figures


def lines(results: Sequence[Result]) -> Lines:
    """A head and one line per row, by step count, then group, then work."""
    metrics = list(results[0].metrics) if results else []
    heads = ["steps", "setting", "NFE", "work", "× ideal", "× measured"]
    heads += [f"{name.upper()} {kind}" for name in metrics for kind in ("mean", "worst")]
    found = [heads]
    groups = list(dict.fromkeys(result.row.group for result in results))
    for r in sorted(results, key=lambda r: (r.row.steps, groups.index(r.row.group), -r.work)):
        measured = "-" if r.times_measured is None else f"{r.times_measured:.2f}"
        line = [str(r.row.steps), r.row.name, f"{r.nfe:.1f}", f"{r.work:.2f}", f"{r.times_ideal:.2f}", measured]
        for name in metrics:
            digits = 2 if name == "psnr" else 4
            line += [f"{mean(r, name):.{digits}f}", f"{worst(r, name):.{digits}f}"]
        found.append(line)
    return found


def margin_lines(found: Sequence[Margin]) -> Lines:
    """A head and one line per margin."""
    made = [["steps", "×", "our setting", "over", "ours dB", "its dB", "margin", "bar", ""]]
    for m in found:
        verdict = "reached" if m.reached else "MISSED"
        figures = [f"{m.ours_db:.2f}", f"{m.over_db:.2f}", f"{m.margin_db:+.2f}", f"{m.bar_db:g}", verdict]
        made.append([str(m.steps), f"{m.times:g}", m.ours, m.over, *figures])
    return made


def aligned(table: Lines) -> str:
    """For a terminal: names to the left, figures to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    text = [i for i, head in enumerate(table[0]) if head in _WORDS]
    return "\n".join(
        "  ".join(c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in table
    )


def markdown(table: Lines) -> str:
    """For a page."""
    rule = ["---" if head in _WORDS else "---:" for head in table[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (table[0], rule, *table[1:]))


def _best_by_work(results: Iterable[Result]) -> list[Result]:
    """Of the settings with the same number of full forwards, the one of the highest mean PSNR."""
    best: dict[int, Result] = {}
    for result in results:
        forwards = round(result.nfe)
        if forwards not in best or mean(result) > mean(best[forwards]):
            best[forwards] = result
    return [best[forwards] for forwards in sorted(best, reverse=True)]


def _margin(best: Result, promise: float, over: str, over_db: float, bar: float) -> Margin:
    return Margin(best.row.steps, promise, best.row.name, over, mean(best), over_db, bar)
