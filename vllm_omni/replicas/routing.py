"""Which replica takes a request: the one where it delays everybody least. Pure numbers; knows no engine and no clock.

The pool of one machine, the router of Ray Serve and `benchmarks/simulate.py` all decide by `choose`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Job = tuple[float, int]  # seconds left, if it had the engine to itself, and pixels
MOST_AGAIN = 2  # times that a request is asked again: one that kills engines must not kill them all
LOOKED_AT = 32  # of more replicas, so many are drawn and compared: the front's time must not grow with their number


@dataclass(frozen=True)
class Asked:
    """A request that looks for a replica."""

    seconds: float  # what it would take if it had an engine to itself
    pixels: int
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Load:
    """What a replica has to do, and what it lacks. `able` is False while it starts, sleeps or has other weights."""

    jobs: Sequence[Job] = ()
    unshared: float = 1.0  # of a row by itself, what it costs in company
    able: bool = True
    adapters: frozenset[str] | None = None  # those that it has loaded; None: nobody asks for any


def added_delay(jobs: Sequence[Job], seconds: float, pixels: int, unshared: float) -> float:
    """Seconds by which a new request delays everybody, itself included, if it joins `jobs`.

    An engine takes requests of one size together: of a forward with r rows, each costs `unshared` of a row by itself,
    and the rest is paid once. It takes the sizes in turn. Let d = `unshared`, w = the new request's seconds,
    m_i = min(left_i, w) how long job i and the new one are there together, and c the largest m_i of the new one's own
    size: so long it has company. Then

    - the new one ends after d·(w + Σ m_i) for the rows, and (1 − d)·(w + Σ over the other sizes of their largest m_i)
      for what is paid once per forward;
    - job i of its own size is delayed by d·m_i: one row more in forwards that it takes part in anyway;
    - job i of another size by d·m_i + (1 − d)·(m_i − min(m_i, c)): forwards that only the new one needs delay it whole.

    The delay added is the sum of all. With d = 1 it is that of equal shares of a processor: w + 2 Σ m_i.
    """
    longest: dict[int, float] = {}
    own: list[float] = []
    others: list[float] = []
    for left, size in jobs:
        met = left if left < seconds else seconds
        (own if size == pixels else others).append(met)
        if met > longest.get(size, 0.0):
            longest[size] = met
    company = longest.pop(pixels, 0.0)
    together = sum(own) + sum(others)
    ends = unshared * (seconds + together) + (1 - unshared) * (seconds + sum(longest.values()))
    alone = sum(met - company for met in others if met > company)
    return ends + unshared * together + (1 - unshared) * alone


def delay_at(load: Load, asked: Asked) -> float:
    """`added_delay` there; infinite if the replica cannot take it: it is not able to, or lacks an adapter."""
    if not load.able or (load.adapters is not None and not asked.adapters <= load.adapters):
        return math.inf
    return added_delay(load.jobs, asked.seconds, asked.pixels, load.unshared)


def choose(loads: Sequence[Load], asked: Asked, draw: random.Random) -> int | None:
    """The index of the replica with the least delay, one at random of several; None if none can take the request.

    Of more than `LOOKED_AT`, so many are drawn; all are looked at only if none of these can take it.
    """
    indices: Sequence[int] = range(len(loads))
    if len(loads) > LOOKED_AT:
        indices = draw.sample(indices, LOOKED_AT)
    best = _least(loads, asked, indices, draw)
    if best is None and len(indices) < len(loads):
        best = _least(loads, asked, range(len(loads)), draw)
    return best


def _least(loads: Sequence[Load], asked: Asked, indices: Sequence[int], draw: random.Random) -> int | None:
    delays = {index: delay_at(loads[index], asked) for index in indices}
    least = min(delays.values(), default=math.inf)
    if least == math.inf:
        return None
    return draw.choice([index for index, delay in delays.items() if delay == least])
