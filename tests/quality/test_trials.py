"""What the results of trials are read as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.errors import InvalidValueError
from vllm_omni.trials import FORECASTS, Away, Trial, _clearly_better, choices, refuse_noise

STEPS = 8
CHOICES = [
    (mask, predictor)
    for (mask, what), predictors in FORECASTS.items()
    for predictor in predictors
    if what == "residual"  # the profile below has no matrix of outputs
]


def profile() -> CacheProfile:
    vectors = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 8)), axis=0)
    gram = tuple(map(tuple, (vectors @ vectors.T).tolist()))
    sigmas = tuple(np.linspace(1, 0.1, STEPS).tolist())
    return CacheProfile(name="x", transformer_class="X", ratios=(1.0,) * STEPS, sigmas=sigmas, gram=gram)


@pytest.mark.parametrize(
    ("linear", "gram", "chosen"),
    [
        ((1, 1), (1, 1), "affine3"),
        ((-4, -4), (1, 1), "linear"),
        ((-4, -2), (1, 1), "affine3"),  # not clearly
        ((-40, 1), (1, 1), "affine3"),  # of one prompt alone
        ((-9, -4), (-5, -5), "linear"),  # by the mean of decibels
    ],
)
def test_a_few_prompts_must_be_clearly_against_the_usual_choice(linear: Any, gram: Any, chosen: str) -> None:
    """Of two prompts, the second ten times as hard: by how many dB two other choices end farther than the usual one."""
    away = {("planned", "linear"): linear, ("planned", "gram"): gram, ("planned", "affine3"): (0, 0)}
    measurement = choices(profile(), 2)
    results = []
    for trial, (mask, predictor) in zip(
        measurement.trials, len(measurement.trials) // len(CHOICES) * CHOICES, strict=True
    ):
        decibels = away.get((mask, predictor), (9, 9))[trial.prompt]
        results.append(Away(0.01 * 10 ** (trial.prompt + decibels / 10), 1.0))
    budgets = measurement.read(results).budgets
    assert budgets and {(budget.mask, budget.predictor) for budget in budgets} == {("planned", chosen)}


@pytest.mark.parametrize(
    ("decibels", "clear"),
    [
        ((3, 4, 5, 3, 4, -1), True),  # 3.0 on average, standard error 0.9
        ((9, 1, -4, 8, -3, 7), False),  # as much on average, standard error 2.3
        ((3, 4, 5, 3, -1), False),  # too few to say
        ((1.3,) * 5, True),
        ((0.0,) * 8, False),
    ],
)
def test_many_prompts_may_disagree_if_the_average_is_clear(decibels: tuple[float, ...], clear: bool) -> None:
    assert _clearly_better(np.array(decibels) * np.log(10) / 10) is clear


def test_what_holds_no_numbers_is_far_away_and_still_a_number() -> None:
    assert Away.of(float("nan"), 0.3).decibels < -50 and Away.of(float("inf"), 0.0).squared < float("inf")
    assert Away.of(0.5, 0.3) == Away(0.5, 0.3)


def test_a_run_that_does_not_repeat_itself_ends_a_measurement_and_names_the_sampler() -> None:
    again = Trial(0)
    refuse_noise(again, Away(1e-9, 1.0), "EulerScheduler")
    refuse_noise(Trial(0, lambda schedule: None), Away(1.0, 1.0), "EulerScheduler")  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidValueError, match="EulerScheduler"):
        refuse_noise(again, Away(0.01, 1.0), "EulerScheduler")
