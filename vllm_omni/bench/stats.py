"""When requests arrive, what they ask for, and what their times amount to. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

PERCENTILES = (50, 90, 95, 99)
Option = TypeVar("Option")


@dataclass(frozen=True)
class Sample:
    """One request. Times are seconds since the load began; `due` is when it was to be sent.

    `error` is empty for a request that got what it asked for, and names a kind of failure otherwise.
    """

    due: float
    ended: float
    pictures: int = 0
    error: str = ""

    @property
    def latency_s(self) -> float:
        """From when the request was due, so that a generator that falls behind does not hide a server's delay."""
        return self.ended - self.due


@dataclass(frozen=True)
class Summary:
    """What a load amounts to. Latencies are those of requests that succeeded; None if none did.

    Goodput: successes within the deadline, per second, and their share of all requests; the same as throughput and
    success without a deadline.
    """

    requests: int
    succeeded: int
    errors: dict[str, int]
    seconds: float
    requests_per_s: float
    pictures_per_s: float
    mean_s: float | None
    percentiles_s: dict[str, float] | None
    max_s: float | None
    deadline_s: float | None
    goodput_per_s: float
    goodput_share: float

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def summarise(samples: Sequence[Sample], deadline_s: float | None = None) -> Summary:
    """The summary of a load; its duration is from the first request due to the last reply."""
    good = [sample for sample in samples if not sample.error]
    latencies = sorted(sample.latency_s for sample in good)
    seconds = max((s.ended for s in samples), default=0.0) - min((s.due for s in samples), default=0.0)
    in_time = sum(deadline_s is None or latency <= deadline_s for latency in latencies)
    return Summary(
        requests=len(samples),
        succeeded=len(good),
        errors=dict(Counter(sample.error for sample in samples if sample.error).most_common()),
        seconds=seconds,
        requests_per_s=len(good) / seconds if seconds else 0.0,
        pictures_per_s=sum(sample.pictures for sample in good) / seconds if seconds else 0.0,
        mean_s=sum(latencies) / len(latencies) if latencies else None,
        percentiles_s={f"p{q}": percentile(latencies, q) for q in PERCENTILES} if latencies else None,
        max_s=latencies[-1] if latencies else None,
        deadline_s=deadline_s,
        goodput_per_s=in_time / seconds if seconds else 0.0,
        goodput_share=in_time / len(samples) if samples else 0.0,
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two nearest ranks: numpy's default method."""
    if not values or not 0 <= q <= 100:
        raise ValueError(f"a percentile between 0 and 100 of at least one value, not {q} of {len(values)}")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests arrive at random, `rate` a second on average (Poisson); the first at once.

    An infinite rate sends all at once.
    """
    draw = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + (draw.expovariate(rate) if rate < float("inf") else 0.0))
    return times[:count]


def mix(options: Sequence[tuple[Option, float]], count: int, seed: int = 0) -> list[Option]:
    """`count` draws from (option, weight) pairs, in shares as near the weights as whole numbers allow, shuffled.

    Every option gets the whole part of its share; what is left goes to the largest remainders (Hamilton's method).
    """
    total = sum(weight for _, weight in options)
    shares = [count * weight / total for _, weight in options]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(options)), key=lambda i: counts[i] - shares[i])
    for i in by_rest[: count - sum(counts)]:
        counts[i] += 1
    drawn = [option for (option, _), times in zip(options, counts, strict=True) for _ in range(times)]
    random.Random(seed).shuffle(drawn)
    return drawn


def weighted(text: str) -> tuple[str, float]:
    """("512x512", 3.0) of "512x512:3"; the weight is 1 if none is given. ValueError for one that is not above 0."""
    option, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    number = float(weight)
    if not (option and 0 < number < float("inf")):
        raise ValueError(text)
    return option, number
