"""What a report compares: one row is one setting at one step count. Pure; draws nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_omni.diffusion.cache.plan.schedule import forced_steps
from vllm_omni.diffusion.cache.settings import PRESETS
from vllm_omni.errors import InvalidValueError, UnknownChoiceError

UNCACHED, FEWER, PLANNED, RULE, GIVEN = "uncached", "fewer steps", "planned", "MagCache rule, reuse", "given"
PROMISES = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)  # the scan from which the default preset is chosen
TARGETS = (1.5, 2.0, 3.0, 4.0)  # where other methods are compared
OTHER_PREDICTORS = ("linear",)


@dataclass(frozen=True)
class Row:
    """One line of the report: `steps` of the reference, and how the same prompts and seeds are drawn.

    `cache` is a request's own setting, as JSON so that rows compare and can be stored; a peer has a `strength` instead.
    Rows of one `group` make one line of the chart.
    """

    group: str
    name: str
    steps: int
    cache: str = '"off"'
    run_steps: int | None = None  # fewer steps: what is run instead of `steps`
    peer: str | None = None
    strength: float | None = None

    @property
    def request_cache(self) -> Any:
        return json.loads(self.cache)


def reference(steps: int) -> Row:
    return Row(UNCACHED, UNCACHED, steps)


def fewer(steps: int, forwards: int) -> Row:
    """The control: as many steps as a setting has full forwards."""
    return Row(FEWER, f"{FEWER}: {forwards}", steps, run_steps=forwards)


def setting(group: str, name: str, steps: int, cache: Any) -> Row:
    return Row(group, name, steps, json.dumps(cache, sort_keys=True))


def default_rows(steps: int, ratios: Sequence[float]) -> list[Row]:
    """Ours: promises with the planner's weights and a named predictor's, their controls, and the published rule.

    `ratios`: the checkpoint's magnitude curve at `steps`.
    """
    rows = []
    for promise in PROMISES:
        if round(steps / promise) >= len(forced_steps(steps)):
            rows.append(setting(PLANNED, f"{PLANNED} {promise:g}x", steps, {"speedup": promise}))
            rows.append(fewer(steps, round(steps / promise)))
    for target in TARGETS:
        forwards = round(steps / target)
        if (rule := tuned_rule(ratios, forwards)) is not None:
            rows.append(setting(RULE, f"{RULE} {target:g}x", steps, rule | {"predictor": "reuse"}))
    for predictor in OTHER_PREDICTORS:
        for target in TARGETS:
            cache = {"speedup": target, "predictor": predictor}
            if round(steps / target) >= len(forced_steps(steps)):
                rows.append(setting(f"{PLANNED}, {predictor}", f"{PLANNED}, {predictor} {target:g}x", steps, cache))
    return list(dict.fromkeys(rows))


def urgency(row: Row) -> int:
    """Which rows come first where time is short: those that the margins and the default need, of all step counts."""
    return {PLANNED: 0, FEWER: 1, RULE: 2}.get(row.group, 3)


def tuned_rule(ratios: Sequence[float], forwards: int) -> dict[str, float] | None:
    """The published threshold rule with exactly so many full forwards on this curve; the paper's K where it can.

    None where the rule has no such plan.
    """
    from vllm_omni.diffusion.cache.plan.rule import magcache_plan

    for longest in (5, 8, len(ratios)):
        for threshold in np.geomspace(0.005, 20, 400):
            if sum(magcache_plan(ratios, threshold, longest, 0.1)) == forwards:
                return {"threshold": float(threshold), "max_skip_steps": longest, "retention_ratio": 0.1}
    return None


def given_rows(steps: int, settings: Sequence[Any]) -> list[Row]:
    """The user's own settings, each a preset's name, "off" or a dict as in a request's `cache`."""
    rows = []
    for cache in settings:
        name = cache if isinstance(cache, str) else " ".join(f"{k}={v}" for k, v in cache.items())
        rows.append(setting(GIVEN, name, steps, cache))
    return rows


def read_settings(texts: Sequence[str]) -> list[Any]:
    """From the command line: presets' names, JSON objects, or files that hold a JSON list of these."""
    settings: list[Any] = []
    for text in texts:
        if text in PRESETS:
            settings.append(text)
        elif text.lstrip().startswith("{"):
            settings.append(_json(text, text))
        elif Path(text).is_file():
            content = _json(text, Path(text).read_text())
            settings += content if isinstance(content, list) else [content]
        else:
            raise UnknownChoiceError("--settings", text, PRESETS, ", a JSON object, or a file of a JSON list")
    for entry in settings:
        if not isinstance(entry, str | Mapping):
            raise InvalidValueError("--settings", entry, "must be a preset's name or a JSON object")
    return settings


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidValueError("--settings", name, f"must be JSON ({error})") from None
