"""Weights of all steps at once, and the search for masks that suit them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from vllm_omni.diffusion.cache.plan.coherent import (
    MOST,
    OWN,
    coherence,
    coherent_cost,
    coherent_terms,
    searched,
)
from vllm_omni.diffusion.cache.plan.planner import best_plan, gram_costs
from vllm_omni.diffusion.cache.plan.predictors import forecasts
from vllm_omni.diffusion.cache.plan.schedule import forced_steps

STEPS = 10
MASK = (True, False, True, False, False, True, False, False, True, True)


def smooth_run(steps: int = STEPS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(outputs of every step, weights): a drifting sum of a few slow waves."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, steps)[:, None]
    waves = np.concatenate([np.cos(k * time + rng.uniform(0, 6, 30)) / (1 + k) for k in range(1, 5)], axis=1)
    return waves + 0.01 * rng.standard_normal(waves.shape), rng.uniform(0.5, 2.0, steps) / steps


def end_of(terms: dict[int, tuple[tuple[int, float], ...]], outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each skipped step's error, weighted: (skipped steps, numbers)."""
    errors = [sum(w * outputs[a] for a, w in own) - outputs[step] for step, own in terms.items()]
    return np.array([weights[step] for step in terms])[:, None] * np.array(errors)


def stated_cost(outputs: np.ndarray, weights: np.ndarray, terms: dict[int, tuple[tuple[int, float], ...]]) -> float:
    moved, steps = end_of(terms, outputs, weights), list(terms)
    alike = (coherence(np.ones(len(weights))))[np.ix_(steps, steps)]
    return float(np.sum(alike * (moved @ moved.T)))


def test_the_weights_are_the_best_that_sum_to_one() -> None:
    """Whichever weight is moved, what is minimised grows; and the cost is what the formula says."""
    outputs, weights = smooth_run()
    gram = outputs @ outputs.T
    terms = coherent_terms(MASK, gram, weights)
    least = stated_cost(outputs, weights, terms)
    assert coherent_cost(MASK, gram, coherence(weights)) == pytest.approx(least, rel=1e-6)
    for step, own in terms.items():
        assert sum(weight for _, weight in own) == pytest.approx(1.0) and len(own) <= 3
        assert all(anchor < step and MASK[anchor] for anchor, _ in own)
        for (first, a), (second, b) in combinations(own, 2):
            for shift in (-0.05, 0.05):
                moved = tuple({**dict(own), first: a + shift, second: b - shift}.items())
                assert stated_cost(outputs, weights, terms | {step: moved}) > least


def test_errors_cancel_where_the_run_ends() -> None:
    """Step by step each error is smaller; all of them together are smaller here."""
    for seed in range(5):
        outputs, weights = smooth_run(seed=seed)
        gram = outputs @ outputs.T
        ours = end_of(coherent_terms(MASK, gram, weights), outputs, weights)
        alone = end_of(forecasts(MASK, np.linspace(1, 0.1, STEPS).tolist(), "affine", gram), outputs, weights)
        assert np.linalg.norm(ours.sum(axis=0)) < 0.5 * np.linalg.norm(alone.sum(axis=0)), seed


def test_steps_far_apart_do_not_cancel_one_another() -> None:
    alike = coherence(np.ones(40))
    assert np.allclose(np.diag(alike), 1 + OWN) and alike[0, 3] > 0.95 and alike[0, 39] < 0.1
    assert np.linalg.eigvalsh(alike)[0] > 0  # no plan costs less than nothing


def test_no_forecast_crosses_a_switch_of_denoisers() -> None:
    outputs, weights = smooth_run()
    terms = coherent_terms(MASK, outputs @ outputs.T, weights, switches=(5,))
    assert all(anchor >= 5 for step, own in terms.items() if step > 5 for anchor, _ in own)
    assert terms[6] == ((5, 1.0),) and len(terms[4]) == 2


@pytest.mark.parametrize("guarded", [True, False])
def test_a_search_finds_the_best_mask_there_is(guarded: bool) -> None:
    """Of ten steps all masks can be tried; the start is the planner's, the end is never dearer."""
    for seed in range(4):
        outputs, weights = smooth_run(seed=seed)
        gram, covariance, sigmas = outputs @ outputs.T, coherence(weights), np.linspace(1, 0.1, STEPS).tolist()
        forced = forced_steps(STEPS, guarded)
        for nfe in (3, 5, 7):
            start = best_plan(gram_costs(gram, sigmas, "affine"), nfe, guarded)
            found = searched(start, gram, covariance, forced)
            masks = [
                tuple(step in chosen for step in range(STEPS))
                for chosen in map(set, combinations(range(STEPS), nfe))
                if forced <= chosen
            ]
            least = min(coherent_cost(mask, gram, covariance) for mask in masks)
            assert found in masks and coherent_cost(found, gram, covariance) == pytest.approx(least, rel=1e-3)


def test_a_search_is_repeatable_and_no_slower_for_longer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def counted(*arguments: object) -> float:
        calls[0] += 1
        return coherent_cost(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("vllm_omni.diffusion.cache.plan.coherent.coherent_cost", counted)
    outputs, weights = smooth_run(100)
    gram, covariance, forced = outputs @ outputs.T, coherence(weights), forced_steps(100)
    start = tuple(step % 3 == 0 for step in range(100))
    found = searched(start, gram, covariance, forced)
    assert calls[0] < 250 and found == searched(start, gram, covariance, forced)
    assert sum(found) == sum(start) and found[0] and found[-1]
    calls[0] = 0
    assert searched((True,) * 100, gram, covariance, forced) == (True,) * 100 and calls[0] <= MOST


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e6])
def test_a_matrix_of_any_size_gives_finite_weights(value: float) -> None:
    terms = coherent_terms(MASK, np.full((STEPS, STEPS), value), np.ones(STEPS))
    assert np.isfinite([weight for own in terms.values() for _, weight in own]).all()
