"""What the results of trials are read as."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from vllm_omni.diffusion.cache.profile import CacheProfile, MeasuredBudget
from vllm_omni.errors import InvalidValueError
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.made import values
from vllm_omni.trials import Away, Trial, figures, kept_by_most, refuse_noise

STEPS = 8


def profile() -> CacheProfile:
    vectors = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 8)), axis=0)
    gram = tuple(map(tuple, (vectors @ vectors.T).tolist()))
    sigmas = tuple(np.linspace(1, 0.1, STEPS).tolist())
    return CacheProfile(name="x", transformer_class="X", ratios=(1.0,) * STEPS, sigmas=sigmas, gram=gram)


def test_a_sound_is_compared_as_loud_as_its_peak() -> None:
    """A quiet one and a loud one of the same noise in proportion; silence is no number less."""
    draw = np.random.default_rng(3)
    sound, noise = draw.standard_normal((1, 400)), 0.01 * draw.standard_normal((1, 400))

    def decibels(loud: float) -> float:
        made = [values(OmniRequestOutput("", audio=[loud * each])) for each in (sound + noise, sound)]
        return Away.between(*made, kept=False).decibels

    assert decibels(1.0) == pytest.approx(decibels(0.02), abs=1e-3) == pytest.approx(40 + 20 * np.log10(3), abs=2)
    assert values(OmniRequestOutput("", audio=[np.zeros((1, 4))])).abs().sum() == 0
    picture = np.full((2, 2, 3), 0.25)
    assert values(OmniRequestOutput("", images=[picture], audio=[sound])).eq(0.25).all()


def test_figures_are_what_nine_of_ten_keep_of_each_way_and_decide_nothing() -> None:
    terms = {step: ((0, 1.0),) for step in (2, 3, 4, 5)}
    budgets = (MeasuredBudget(speedup=8 / 6, terms={}), MeasuredBudget(speedup=2.0, terms=terms))
    both = [40.0, 25.0, 10.0, 30.0, 29.0, 33.0, 15.0]  # plan, rule, fewer; tuned, untuned, rule, fewer

    def measured(pairs: int) -> tuple[MeasuredBudget, ...]:
        measurement = figures(profile().model_copy(update={"budgets": budgets}), pairs)
        results = [Away(10 ** (-(decibels + prompt) / 10), 1.0) for prompt in range(pairs) for decibels in both]
        return measurement.read(results).budgets

    other, judged = measured(5)
    left = kept_by_most([0.0, 1.0, 2.0, 3.0, 4.0])
    assert left is not None and left < 0
    kept = [judged.psnr, judged.untuned_psnr, judged.rule_psnr, judged.fewer_steps_psnr]
    assert kept == pytest.approx([30 + left, 29 + left, 33 + left, 15 + left]) and judged.psnr_mean == 32.0
    assert judged.terms == terms and judged.pairs == 5 and not judged.by_rule
    assert (other.psnr, other.untuned_psnr) == (pytest.approx(40 + left), None)
    assert [(one.psnr, one.psnr_mean) for one in measured(4)] == [(None, 41.5), (None, 31.5)]
    assert not other.fewer_steps_are_nearer and not judged.fewer_steps_are_nearer
    both[2] = 40.1
    assert [one.fewer_steps_are_nearer for one in measured(5)] == [True, False]


@pytest.mark.parametrize("count", [5, 6, 8, 16, 28, 29, 46, 64, 128])
@pytest.mark.parametrize("skewed", [False, True])
def test_nine_of_ten_keep_what_is_promised_nineteen_times_of_twenty(count: int, skewed: bool) -> None:
    pairs = np.random.default_rng(count).standard_normal((4000, count))
    tenth = NormalDist().inv_cdf(0.1)
    if skewed:  # a few are much worse than the rest
        pairs, tenth = -np.exp(-pairs / 4), -np.exp(-tenth / 4)
    kept = np.array([kept_by_most(one) for one in (40 + 10 * pairs).tolist()], dtype=float)
    assert (kept <= 40 + 10 * tenth).mean() > (0.85 if skewed and count < 29 else 0.93)
    lowest = kept <= 40 + 10 * pairs.min(axis=1) + 0.005  # rounded
    assert lowest.all() if count < 46 else lowest.mean() < 0.1


def test_few_promise_nothing_and_identical_outputs_take_nothing_away() -> None:
    assert kept_by_most([40.0]) is kept_by_most([40.0] * 4) is None and kept_by_most([40.0] * 5) == 40.0
    some = [44.0, 42.0, 45.0, 43.0, 44.5, 43.5]
    assert kept_by_most([*some, 300.0, 300.0]) == kept_by_most(some)
    assert kept_by_most([300.0] * 5) == 300.0 and kept_by_most([300.0] * 7 + [90.0]) == 90.0
    many = np.random.default_rng(0).standard_normal(9000).tolist()
    assert -2.0 < (kept_by_most(many) or 0.0) < NormalDist().inv_cdf(0.1)


def test_what_holds_no_numbers_is_far_away_and_still_a_number() -> None:
    assert Away.of(float("nan"), 0.3).decibels < -50 and Away.of(float("inf"), 0.0).squared < float("inf")
    assert Away.of(0.5, 0.3) == Away(0.5, 0.3)
    lost = Away.of(float("nan"), float("nan"))
    assert lost.decibels < -50 and lost.gone


def test_a_run_that_does_not_repeat_itself_ends_a_measurement_and_names_the_sampler() -> None:
    again = Trial(0)
    refuse_noise(again, Away(1e-9, 1.0), "EulerScheduler")
    refuse_noise(Trial(0, lambda schedule: None), Away(1.0, 1.0), "EulerScheduler")  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidValueError, match="EulerScheduler"):
        refuse_noise(again, Away(0.01, 1.0), "EulerScheduler")
