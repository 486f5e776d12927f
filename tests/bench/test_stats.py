"""The statistics of a load, against numpy and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm_omni.bench.stats import Sample, arrivals, mix, percentile, summarise, weighted


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("q", [0, 37.5, 50, 95, 99, 100])
def test_percentiles_are_numpys(count: int, q: float) -> None:
    draw = random.Random(count)
    values = [draw.expovariate(1.0) for _ in range(count)]
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-12)


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)


def test_arrivals_are_poisson() -> None:
    """Their gaps have the mean and the deviation of the exponential distribution, and a seed repeats them."""
    times = arrivals(20_000, rate=4.0, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.05)
    assert times == arrivals(20_000, rate=4.0, seed=1) != arrivals(20_000, rate=4.0, seed=2)
    assert arrivals(3, float("inf")) == [0.0, 0.0, 0.0] and arrivals(0, 1.0) == []


@pytest.mark.parametrize(
    ("options", "count", "counts"),
    [
        ([("a", 3.0), ("b", 1.0)], 8, {"a": 6, "b": 2}),
        ([("a", 1.0), ("b", 1.0), ("c", 1.0)], 10, {"a": 4, "b": 3, "c": 3}),
        ([("a", 0.9), ("b", 0.1)], 3, {"a": 3}),
        ([("a", 5.0)], 2, {"a": 2}),
    ],
)
def test_a_mix_has_its_shares(options: list[tuple[str, float]], count: int, counts: dict[str, int]) -> None:
    drawn = mix(options, count, seed=3)
    assert {name: drawn.count(name) for name in drawn} == counts
    assert drawn == mix(options, count, seed=3)


def test_a_mix_is_shuffled() -> None:
    drawn = mix([("a", 1.0), ("b", 1.0)], 40)
    assert drawn != sorted(drawn) and drawn != sorted(drawn, reverse=True)


def test_weights() -> None:
    assert weighted("20") == ("20", 1.0) and weighted("512x512:3") == ("512x512", 3.0)
    for text in ("20:0", ":3", "20:x", "20:-1", "20:inf", "20:nan"):
        with pytest.raises(ValueError):
            weighted(text)


def test_a_summary_by_hand() -> None:
    samples = [
        Sample(due=1.0, ended=2.0, pictures=2),
        Sample(due=1.0, ended=4.0, pictures=2),
        Sample(due=2.0, ended=11.0, error="timeout"),
        Sample(due=2.0, ended=2.5, error="503 queue_full"),
        Sample(due=3.0, ended=3.5, error="503 queue_full"),
    ]
    made = summarise(samples, deadline_s=2.0)
    assert (made.requests, made.succeeded, made.seconds) == (5, 2, 10.0)
    assert made.errors == {"503 queue_full": 2, "timeout": 1}
    assert (made.requests_per_s, made.pictures_per_s) == (0.2, 0.4)
    assert (made.mean_s, made.max_s) == (2.0, 3.0) and made.percentiles_s is not None
    assert made.percentiles_s["p50"] == 2.0 and made.percentiles_s["p90"] == pytest.approx(2.8)
    assert (made.goodput_per_s, made.goodput_share) == (0.1, 0.2)
    assert summarise(samples).goodput_share == 0.4


def test_a_load_without_success_has_no_latency() -> None:
    made = summarise([Sample(0.0, 1.0, error="timeout")])
    assert (made.succeeded, made.mean_s, made.percentiles_s, made.goodput_share) == (0, None, None, 0.0)
    assert summarise([]).seconds == 0.0
