"""What the results of trials are read as."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_omni.diffusion.cache.profile import CacheProfile, MeasuredBudget
from vllm_omni.errors import InvalidValueError
from vllm_omni.trials import Away, Trial, figures, refuse_noise

STEPS = 8


def profile() -> CacheProfile:
    vectors = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 8)), axis=0)
    gram = tuple(map(tuple, (vectors @ vectors.T).tolist()))
    sigmas = tuple(np.linspace(1, 0.1, STEPS).tolist())
    return CacheProfile(name="x", transformer_class="X", ratios=(1.0,) * STEPS, sigmas=sigmas, gram=gram)


def test_figures_are_the_lowest_of_each_way_and_decide_nothing() -> None:
    terms = {step: ((0, 1.0),) for step in (2, 3, 4, 5)}
    budgets = (MeasuredBudget(speedup=8 / 6, terms={}), MeasuredBudget(speedup=2.0, terms=terms))
    measurement = figures(profile().model_copy(update={"budgets": budgets}), 2)
    both = [40.0, 25.0, 10.0, 30.0, 29.0, 33.0, 15.0]  # plan, rule, fewer; tuned, untuned, rule, fewer
    results = [Away(10 ** (-(decibels + prompt) / 10), 1.0) for prompt in (0, 1) for decibels in both]
    other, judged = measurement.read(results).budgets
    assert (judged.psnr, judged.psnr_mean, judged.untuned_psnr, judged.rule_psnr) == (30.0, 30.5, 29.0, 33.0)
    assert judged.terms == terms and judged.pairs == 2 and not judged.by_rule
    assert (other.psnr, other.fewer_steps_psnr, other.untuned_psnr) == (40.0, 10.0, None)


def test_what_holds_no_numbers_is_far_away_and_still_a_number() -> None:
    assert Away.of(float("nan"), 0.3).decibels < -50 and Away.of(float("inf"), 0.0).squared < float("inf")
    assert Away.of(0.5, 0.3) == Away(0.5, 0.3)


def test_a_run_that_does_not_repeat_itself_ends_a_measurement_and_names_the_sampler() -> None:
    again = Trial(0)
    refuse_noise(again, Away(1e-9, 1.0), "EulerScheduler")
    refuse_noise(Trial(0, lambda schedule: None), Away(1.0, 1.0), "EulerScheduler")  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidValueError, match="EulerScheduler"):
        refuse_noise(again, Away(0.01, 1.0), "EulerScheduler")
