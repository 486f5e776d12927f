"""The Pareto chart: nearness to the uncached picture against block work, one panel per step count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.quality.bench import Result
from vllm_omni.quality.report import mean, worst
from vllm_omni.quality.rows import FEWER, GIVEN, PLANNED, RULE

_OURS = {PLANNED: "#c0392b", GIVEN: "#8e44ad"}
_CONTROLS = {FEWER: "#222222", RULE: "#888888"}
_OTHERS = ("#1f77b4", "#2ca02c", "#17becf", "#bcbd22", "#9467bd", "#8c564b", "#e377c2", "#ff7f0e")
_MARKS = "osD^vP*X<>hp"
_POINTS = (GIVEN,)  # unrelated settings: no line through them


def draw(results: Sequence[Result], file: Path, title: str) -> None:
    """Write the chart as a PNG: solid lines are means over pairs, the dotted one is our worst pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted({result.row.steps for result in results})
    size = (1.5 + 6.6 * len(counts), 6.4)
    figure, panels = plt.subplots(1, len(counts), figsize=size, layout="constrained", squeeze=False)
    styles = _styles(results)
    for steps, panel in zip(counts, panels[0], strict=True):
        here = [result for result in results if result.row.steps == steps]
        for group, style in styles.items():
            _line(panel, [result for result in here if result.row.group == group], group, style)
        _dress(panel, steps, [result.work for result in here])
    panels[0][0].set_ylabel("PSNR to the uncached picture, dB (higher is nearer)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 + min(2, len(counts)), frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _styles(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Colour and marker by group, ours and the controls fixed."""
    groups = list(dict.fromkeys(result.row.group for result in results))
    fixed = _OURS | _CONTROLS
    ordered = [g for g in fixed if g in groups] + [g for g in groups if g not in fixed]
    others = [group for group in ordered if group not in fixed]
    styles = {}
    for number, group in enumerate(ordered):
        colour = fixed.get(group) or _OTHERS[others.index(group) % len(_OTHERS)]
        styles[group] = {"color": colour, "marker": _MARKS[number % len(_MARKS)], "markersize": 5}
        styles[group]["linewidth"] = 2.4 if group == PLANNED else 1.3
        styles[group]["linestyle"] = "none" if group in _POINTS else "--" if group.startswith(f"{PLANNED},") else "-"
    return styles


def _line(panel: Any, results: Sequence[Result], group: str, style: dict[str, Any]) -> None:
    points = sorted(results, key=lambda result: result.work)
    if not points:
        return
    work = [point.work for point in points]
    panel.plot(work, [mean(point) for point in points], label=group, zorder=3 if group == PLANNED else 2, **style)
    if group == PLANNED:
        lows = [worst(point) for point in points]
        panel.plot(work, lows, ":", color=style["color"], linewidth=1.5, label=f"{PLANNED}: worst pair")


def _dress(panel: Any, steps: int, work: Sequence[float]) -> None:
    panel.set_xscale("log")
    panel.invert_xaxis()
    times = [t for t in (1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10) if min(work) * 0.95 <= steps / t <= max(work) * 1.05]
    panel.set_xticks([steps / t for t in times], [f"{steps / t:.3g}\n{t:g}×" for t in times])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set(title=f"{steps} steps", xlabel="block work in full forwards, and times less than uncached")
