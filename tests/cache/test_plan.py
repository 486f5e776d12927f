"""Plans, curves and predictors as pure functions, against independent transcriptions and known answers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.plan.curve import resample, resample_log, resample_nearest
from vllm_omni.diffusion.cache.plan.predictors import (
    PREDICTORS,
    RIDGE,
    affine,
    forecasts,
    linear,
    resample_gram,
    reuse,
)
from vllm_omni.diffusion.cache.plan.rule import magcache_plan, mask_plan
from vllm_omni.diffusion.cache.profile import shipped_profile

FLUX = shipped_profile("flux1-dev-28").ratios


class PublishedRule:
    """arXiv 2506.09045 as a model would carry it: state from step to step, asked once per step."""

    def __init__(self, gammas: Sequence[float], delta: float, k: int, rho: float) -> None:
        self.gammas, self.delta, self.k, self.rho = gammas, delta, k, rho
        self.acc, self.n, self.err = 1.0, 0, 0.0
        self.residual_exists = False

    def skips(self, t: int) -> bool:
        if t >= int(self.rho * len(self.gammas) + 0.5) and self.residual_exists:
            self.acc = self.acc * self.gammas[t]
            self.n = self.n + 1
            self.err = self.err + abs(1 - self.acc)
            if self.err <= self.delta and self.n <= self.k:
                return True
        self.acc, self.n, self.err = 1.0, 0, 0.0
        self.residual_exists = True
        return False

    def plan(self, guard: bool) -> tuple[bool, ...]:
        steps = len(self.gammas)
        computed = [not self.skips(t) for t in range(steps)]
        return (*computed[:-1], True) if guard else tuple(computed)


def test_the_plan_is_the_published_rule_for_ten_thousand_settings() -> None:
    draw = random.Random(20250609)
    skipped = 0
    for case in range(10_000):
        steps = draw.randint(1, 60)
        spread = draw.choice([0.001, 0.02, 0.1, 0.4])
        gammas = [1.0, *(draw.uniform(1 - spread, 1 + spread) for _ in range(steps - 1))]
        delta = draw.choice([1e-9, draw.uniform(0.001, 0.5), 10.0])
        k = draw.choice([1, 2, 5, draw.randint(1, 100)])
        rho = draw.choice([0.0, 0.1, 0.2, draw.random()])
        plans = [magcache_plan(gammas, delta, k, rho, guard) for guard in (False, True)]
        rules = [PublishedRule(gammas, delta, k, rho).plan(guard) for guard in (False, True)]
        assert plans == rules, (case, gammas, delta, k, rho)
        skipped += plans[0].count(False)
    assert skipped > 50_000  # the settings exercise the rule


def test_the_plan_of_flux_dev_equals_one_computed_by_hand() -> None:
    """delta 0.24, K 5, rho 0.1: steps 0-2 are kept, and the first run of skips ends where the sum passes delta."""
    plan = magcache_plan(FLUX, 0.24, 5, 0.1)
    assert len(plan) == 28 and plan[:3] == (True, True, True) and plan[-1]
    error, product, step = 0.0, 1.0, 3
    while True:
        product *= FLUX[step]
        error += abs(1 - product)
        if error > 0.24 or step - 2 > 5:
            break
        assert not plan[step]
        step += 1
    assert plan[step] and step > 3


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_step_zero_is_always_computed(rho: float, guard: bool) -> None:
    for steps in (1, 2, 3, 28):
        plan = magcache_plan([1.0] * steps, 100.0, 1000, rho, guard)
        assert plan[0] and len(plan) == steps
        assert plan[-1] or (not guard and steps > 1)
    assert magcache_plan([1.0], 100.0, 1000, rho, guard) == (True,)


def test_the_guard_changes_only_the_last_step() -> None:
    with_guard, without = (magcache_plan([1.0] * 20, 10.0, 100, 0.0, guard) for guard in (True, False))
    assert without == (True,) + (False,) * 19
    assert with_guard == (True,) + (False,) * 18 + (True,)


def test_no_more_than_k_steps_are_skipped_in_a_row() -> None:
    for k in (1, 2, 5):
        plan = magcache_plan([1.0] * 40, 10.0, k, 0.0, False)
        runs = "".join("c" if computed else "s" for computed in plan).split("c")
        assert max(map(len, runs)) == k


def test_a_steps_mask_becomes_a_plan() -> None:
    mask = [1, 0, 0, 1, 0, 0, 0, 1]
    assert mask_plan(mask, 8) == tuple(map(bool, mask))
    assert mask_plan([1, 0, 0, 0], 4, compute_last_step=False) == (True, False, False, False)
    assert mask_plan([1, 0, 0, 0], 4) == (True, False, False, True)
    assert mask_plan([0, 0, 0], 3, compute_last_step=False)[0] is True
    assert mask_plan(mask, 1) == (True,)
    for steps in range(1, 60):
        plan = mask_plan(mask, steps)
        assert len(plan) == steps and plan[0] and plan[-1]
    share = sum(mask_plan([1, 0] * 25, 200, compute_last_step=False)) / 200
    assert abs(share - 0.5) < 0.05


# ------------------------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("method", ["log", "nearest"])
def test_a_curve_of_the_right_length_is_returned_as_it_is(method: str) -> None:
    assert resample(FLUX, 28, method) == FLUX


@pytest.mark.parametrize("steps", [2, 3, 4, 10, 27, 29, 50, 333])
def test_log_resampling_keeps_the_total_magnitude(steps: int) -> None:
    curve = resample_log(FLUX, steps)
    assert len(curve) == steps and curve[0] == 1.0 and all(ratio > 0 for ratio in curve)
    assert math.prod(curve) == pytest.approx(math.prod(FLUX), rel=1e-9)


def test_log_resampling_interpolates_the_cumulated_log_magnitude() -> None:
    steps = 50
    heights = np.cumsum(np.log(FLUX))
    wanted = np.interp(np.linspace(0, 27, steps), np.arange(28), heights)
    assert np.allclose(np.cumsum(np.log(resample_log(FLUX, steps))), wanted, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 50, 333])
def test_nearest_resampling_takes_values_of_the_curve(steps: int) -> None:
    curve = resample_nearest(FLUX, steps)
    places = [round(i * 27 / (steps - 1)) for i in range(1, steps)]
    assert curve == (1.0, *(FLUX[place] for place in places))


@pytest.mark.parametrize("method", ["log", "nearest"])
def test_curves_of_any_length_are_resampled_to_any_step_count(method: str) -> None:
    for length in (1, 2, 3, 28, 100):
        curve = [1.0] + [1.01] * (length - 1)
        for steps in (1, 2, 3, 28, 100):
            got = resample(curve, steps, method)
            assert len(got) == steps and all(math.isfinite(ratio) and ratio > 0 for ratio in got)
            assert got[0] == 1.0


# -------------------------------------------------------------------------------------------------------- predictors

SIGMAS = tuple(1 - i / 20 for i in range(20))


def random_gram(rng: np.random.Generator, steps: int, rank: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Smoothly drifting vectors and their Gram matrix."""
    vectors = np.cumsum(rng.standard_normal((steps, rank)), axis=0) + 3 * rng.standard_normal(rank)
    return vectors, vectors @ vectors.T / rank


def expected_error(gram: np.ndarray, anchors: Sequence[int], weights: Sequence[float], target: int) -> float:
    w = np.asarray(weights)
    a = list(anchors)
    return float(gram[target, target] - 2 * w @ gram[a, target] + w @ gram[np.ix_(a, a)] @ w)


def test_reuse_takes_the_last_residual() -> None:
    assert list(reuse([3], 5, SIGMAS, None)) == [1.0]
    assert list(reuse([1, 3], 5, SIGMAS, None)) == [0.0, 1.0]


def test_linear_reproduces_a_line_in_sigma() -> None:
    sigmas = [1.0, 0.93, 0.8, 0.55, 0.3, 0.12]
    values = [2.5 - 4.0 * sigma for sigma in sigmas]
    for target in (3, 4, 5):
        weights = linear([0, 2], target, sigmas, None)
        assert weights[0] * values[0] + weights[1] * values[2] == pytest.approx(values[target], abs=1e-12)
        assert sum(weights) == pytest.approx(1.0)


def test_linear_falls_back_to_reuse() -> None:
    assert list(linear([0], 1, SIGMAS, None)) == [1.0]
    assert list(linear([0, 1], 2, [0.5, 0.5, 0.4], None)) == [0.0, 1.0]


def test_least_squares_without_a_matrix_is_reuse() -> None:
    assert list(affine([1, 3], 5, SIGMAS, None)) == [0.0, 1.0]


def test_least_squares_beat_reuse_and_linear_in_expected_error() -> None:
    rng = np.random.default_rng(1)
    better = 0
    for _ in range(300):
        _, gram = random_gram(rng, 20)
        first, second, target = sorted(rng.choice(20, 3, replace=False))
        anchors = [int(first), int(second)]
        ridge = RIDGE * np.trace(gram[np.ix_(anchors, anchors)]) / 2
        best = expected_error(gram, anchors, affine(anchors, int(target), SIGMAS, gram), int(target))
        for other in (reuse, linear):
            weights = other(anchors, int(target), SIGMAS, None)
            bound = expected_error(gram, anchors, weights, int(target))
            assert best <= bound + ridge * float(np.dot(weights, weights)) + 1e-9
            better += best < bound
    assert better > 590


def test_resample_gram_is_the_identity_on_its_own_sigmas() -> None:
    _, gram = random_gram(np.random.default_rng(2), 20)
    assert np.allclose(resample_gram(gram, SIGMAS, SIGMAS), gram, rtol=1e-9, atol=1e-12)


def test_resample_gram_is_that_of_interpolated_residuals() -> None:
    vectors, gram = random_gram(np.random.default_rng(3), 20)
    wanted = np.array([1.2, 0.99, 0.731, 0.5, 0.26, 0.06, 0.0])
    order = np.argsort(SIGMAS)
    mixed = np.stack([np.interp(wanted, np.array(SIGMAS)[order], column[order]) for column in vectors.T], axis=1)
    got = resample_gram(gram, SIGMAS, wanted.tolist())
    assert np.allclose(got, mixed @ mixed.T / vectors.shape[1], rtol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_resample_gram_stays_positive_semi_definite(steps: int) -> None:
    rng = np.random.default_rng(steps)
    _, gram = random_gram(rng, 20, rank=5)
    got = resample_gram(gram, SIGMAS, np.sort(rng.random(steps))[::-1].tolist())
    assert got.shape == (steps, steps) and np.allclose(got, got.T)
    assert np.linalg.eigvalsh(got)[0] >= -1e-9 * np.trace(got)


@pytest.mark.parametrize("predictor", list(PREDICTORS))
def test_forecasts_use_only_earlier_computed_steps(predictor: str) -> None:
    draw = random.Random(4)
    _, gram = random_gram(np.random.default_rng(4), 20)
    order = PREDICTORS[predictor][1]
    for _ in range(200):
        plan = (True, *(draw.random() < 0.4 for _ in range(19)))
        terms = forecasts(plan, SIGMAS, predictor, gram)
        assert set(terms) == {step for step, computed in enumerate(plan) if not computed}
        for step, pairs in terms.items():
            recent = [s for s in range(step) if plan[s]][-order:]
            assert pairs and {anchor for anchor, _ in pairs} <= set(recent)
            assert all(math.isfinite(weight) for _, weight in pairs)


def test_a_residual_is_kept_until_its_last_use() -> None:
    plan = (True, True, False, True, False, False, True)
    made = CachePlan.of(plan, forecasts(plan, SIGMAS, "linear", None))
    assert made.full_forwards == 4
    for step in range(len(plan)):
        later = {anchor for target, pairs in made.terms.items() if target > step for anchor, _ in pairs}
        assert made.needed_after[step] == later
        held = {anchor for anchor in made.needed_after[step] if anchor <= step}
        assert len(held) <= 2
