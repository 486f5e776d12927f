"""The statistics of several engines as those of one. Numbers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from vllm_omni.engine.interface import EngineStats, ReplicaStats

RECENT = 32
_OWN = {"requests", "replicas", "denoisers", "profiles", "learning", "recent"}
_SUMMED = tuple(field.name for field in fields(EngineStats) if field.name not in _OWN)


def added_up(
    every: Sequence[EngineStats], outcomes: Mapping[str, int], replicas: Sequence[ReplicaStats]
) -> EngineStats:
    """Counters and gauges are sums; what is known of the model is the first engine's.

    `outcomes` are the pool's: a request that two engines have seen has ended once.
    """
    every = every or [EngineStats()]
    sums = {name: _sum([vars(stats)[name] for stats in every]) for name in _SUMMED}
    return replace(
        next((stats for stats in every if stats.denoisers), every[-1]),
        **sums,
        requests=dict(outcomes),
        replicas=tuple(replicas),
        learning="; ".join(dict.fromkeys(stats.learning for stats in every if stats.learning)),
        recent=tuple(entry for stats in every for entry in stats.recent[-max(1, RECENT // len(every)) :]),
    )


def counters_of(stats: EngineStats) -> EngineStats:
    """What is left of the statistics of an engine that has gone."""
    return replace(
        stats,
        running=0,
        waiting=0,
        max_num_seqs=0,
        cache_bytes=0,
        prompt_bytes=0,
        queued_cost_s=0.0,
        learning="",
        recent=(),
    )


def _sum(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], Mapping):
        return sum(values)
    total: Counter[Any] = Counter()
    for value in values:
        total.update(value)
    return dict(total)
