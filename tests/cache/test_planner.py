"""The planner against exhaustive search, the weights of all steps at once, and predictors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from planning import budgeted, planned

from vllm_omni.diffusion.cache.plan.planner import (
    GOOD,
    NEARLY,
    NOISE,
    OWN,
    best_plans,
    coherence,
    coherent_cost,
    coherent_terms,
    step_weights,
)
from vllm_omni.diffusion.cache.plan.predictors import (
    NEED_GRAM,
    PREDICTORS,
    affine,
    forecasts,
)
from vllm_omni.diffusion.cache.plan.rule import magcache_plan
from vllm_omni.diffusion.cache.plan.schedule import forced_steps
from vllm_omni.diffusion.cache.profile import CacheProfile, shipped_profile
from vllm_omni.diffusion.cache.settings import PRESETS, DiffusionCacheConfig, PredictorName
from vllm_omni.errors import InvalidValueError

DEMO = shipped_profile("demo")


def random_gram(rng: np.random.Generator, steps: int) -> np.ndarray:
    vectors = np.cumsum(rng.standard_normal((steps, 2 * steps)), axis=0) + 3 * rng.standard_normal(2 * steps)
    return vectors @ vectors.T / (2 * steps)


def random_sigmas(rng: np.random.Generator, steps: int) -> tuple[float, ...]:
    return tuple(np.sort(rng.random(steps) + 0.01)[::-1].tolist())


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
    """The formula, with what each step shares with no other as numbers of its own."""
    apart = np.diag(np.sqrt(NOISE * (outputs**2).sum(axis=1)))
    moved, steps = end_of(terms, np.concatenate([outputs, apart], axis=1), weights), list(terms)
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
    """Of ten steps all masks can be tried."""
    for seed in range(4):
        outputs, weights = smooth_run(seed=seed)
        gram, covariance = outputs @ outputs.T, coherence(weights)
        forced = forced_steps(STEPS, guarded)
        for nfe in (3, 5, 7):
            found, *others = best_plans(nfe, gram, weights, forced)
            masks = [
                tuple(step in chosen for step in range(STEPS))
                for chosen in map(set, combinations(range(STEPS), nfe))
                if forced <= chosen
            ]
            costs = {mask: coherent_cost(mask, gram, covariance) for mask in masks}
            assert costs[found] == pytest.approx(min(costs.values()), rel=1e-3)
            near = sorted((mask for mask in masks if costs[mask] <= NEARLY * costs[found]), key=costs.__getitem__)
            wanted: list[Any] = []  # the cheapest there are, of which no two are neighbours
            for mask in near:
                apart = [np.abs(np.cumsum(mask) - np.cumsum(other)).sum() for other in wanted]
                if len(wanted) < GOOD and min(apart, default=2) > 1:
                    wanted.append(mask)
            assert [costs[mask] for mask in (found, *others)] == pytest.approx([costs[mask] for mask in wanted])


def test_a_search_is_repeatable_and_no_slower_for_longer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def counted(*arguments: object) -> float:
        calls[0] += 1
        return coherent_cost(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("vllm_omni.diffusion.cache.plan.planner.coherent_cost", counted)
    outputs, weights = smooth_run(100)
    gram, forced = outputs @ outputs.T, forced_steps(100)
    found, *others = best_plans(34, gram, weights, forced)
    assert calls[0] < 200 and (found, *others) == best_plans(34, gram, weights, forced)
    assert sum(found) == 34 and found[0] and found[-1]
    calls[0] = 0
    assert best_plans(100, gram, weights, forced) == ((True,) * 100,) and calls[0] == 1
    calls[0] = 0
    best_plans(3, gram[:5, :5], weights[:5], forced_steps(5))
    assert calls[0] <= 3  # there are no more masks


@pytest.mark.parametrize(("nfe", "steps", "forced"), [(1, 1, {0}), (1, 5, {0}), (2, 2, {0, 1}), (3, 6, {0, 2, 5})])
def test_the_least_plans_are_the_forced_steps(nfe: int, steps: int, forced: set[int]) -> None:
    only = (tuple(step in forced for step in range(steps)),)
    assert best_plans(nfe, np.eye(steps), np.ones(steps), forced) == only


@pytest.mark.parametrize("name", ["demo", "demo-video"])
@pytest.mark.parametrize(("steps", "nfe"), [(20, 10), (40, 16), (50, 25), (100, 40)])
def test_weights_stay_small_between_measured_noise_levels(name: str, steps: int, nfe: int) -> None:
    """There outputs are interpolated from two others, so that three lie on one line, and any weights seem to do."""
    profile = shipped_profile(name)
    for sigmas in (np.linspace(1, 1 / steps, steps), np.linspace(1, 0.02, steps) ** 2):
        made = planned(DiffusionCacheConfig(nfe=nfe), profile.ratios, profile, steps, sigmas.tolist())
        assert made.predictor == "coherent"
        assert max(abs(weight) for own in made.terms.values() for _, weight in own) < 8


def test_one_search_serves_every_way_to_ask_for_as_many_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return best_plans(*arguments)

    monkeypatch.setattr("vllm_omni.diffusion.cache.plan.compose.best_plans", counted)
    sigmas = tuple(np.linspace(1, 0.031, 28).tolist())
    made = [
        planned(DiffusionCacheConfig(**settings), DEMO.ratios, DEMO, 28, sigmas).compute
        for settings in ({"nfe": 14}, {"speedup": 2.0}, {"speedup": 2.001}, {"speedup": 1.999})
    ]
    assert len(set(made)) == 1 and len(calls) == 1


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e6])
def test_a_matrix_of_any_size_gives_finite_weights(value: float) -> None:
    terms = coherent_terms(MASK, np.full((STEPS, STEPS), value), np.ones(STEPS))
    assert np.isfinite([weight for own in terms.values() for _, weight in own]).all()


def test_a_call_that_corrects_the_step_before_shares_its_weight() -> None:
    """Heun's schedule: a step is the mean of two calls, and the second's noise level comes again as the next one's."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.tolist()[:-1]
    once = sorted(set(sigmas), reverse=True)
    moved = -np.diff([*once, 0.0])
    assert len(sigmas) == 7 and step_weights(once) == pytest.approx(moved)
    assert step_weights(sigmas) == pytest.approx([*np.repeat(moved[:3] / 2, 2), moved[3]])
    assert step_weights(sigmas, np.arange(7.0)) == pytest.approx(np.arange(7) * step_weights(sigmas))


def test_long_schedules_are_planned_too() -> None:
    """`benchmarks/planning.py` has the milliseconds."""
    for steps, nfe in ((50, 25), (100, 30), (1000, 300)):
        sigmas = tuple(np.linspace(1, 1 / steps, steps).tolist())
        for predictor in ("auto", "affine"):
            config = DiffusionCacheConfig(nfe=nfe, predictor=predictor)
            made = planned(config, DEMO.ratios, DEMO, steps, sigmas)
            assert made.full_forwards == nfe and np.isfinite([w for t in made.terms.values() for _, w in t]).all()
            assert made.predictor == ("affine" if predictor == "affine" or steps > 100 else "coherent")


# ----------------------------------------------------------------------------------------------------------- predictors


def test_predictor_names_are_the_same_in_every_table() -> None:
    assert set(PREDICTORS) == set(get_args(PredictorName))
    assert set(NEED_GRAM) < set(PREDICTORS)


def test_affine_weights_sum_to_one_and_are_the_best_that_do() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        gram = random_gram(rng, 10)
        first, second, target = sorted(rng.choice(10, 3, replace=False).tolist())
        corner, cross = gram[np.ix_([first, second], [first, second])], gram[[first, second], target]

        def error(w: np.ndarray, corner: np.ndarray = corner, cross: np.ndarray = cross) -> float:
            return float(w @ corner @ w - 2 * w @ cross)

        best = affine([first, second], target, (), gram)
        assert best.sum() == pytest.approx(1.0)
        for shift in (-0.5, -0.05, 0.05, 0.5):
            assert error(best) < error(best + shift * np.array([1.0, -1.0]))
    assert list(affine([1, 2], 4, (), None)) == [0.0, 1.0]
    assert affine([3], 5, (), gram)[0] == pytest.approx(1.0)


def test_a_matrix_of_zeros_gives_finite_weights() -> None:
    for weigh, order in PREDICTORS.values():
        assert np.isfinite(weigh([0, 1, 2][:order], 4, (1.0, 0.8, 0.6, 0.4, 0.2), np.zeros((5, 5)))).all()


# ------------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize(
    ("speedup", "steps", "nfe"), [(1, 28, 28), (2.0, 28, 14), (3.1, 28, 9), (3, 5, 2), (2, 1, None)]
)
def test_a_speedup_is_a_number_of_full_forwards(speedup: float, steps: int, nfe: int | None) -> None:
    config = DiffusionCacheConfig(speedup=speedup)
    if nfe is None:
        with pytest.raises(InvalidValueError, match=r"speedup is out of reach in 1 steps \(nearest: 1, "):
            budgeted(config, steps)
    else:
        assert budgeted(config, steps) == nfe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 29}, r"nfe must be between 2 and 28 for 28 steps \(nearest: 28\), got 29"),
        ({"nfe": 1}, r"nfe must be between 2 and 28 for 28 steps \(nearest: 2\), got 1"),
        ({"speedup": 40}, r"speedup is out of reach in 28 steps \(nearest: 14, 2 full forwards\), got 40"),
    ],
)
def test_an_impossible_budget_names_the_nearest(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        budgeted(DiffusionCacheConfig.from_dict(settings), 28)


def test_a_budget_is_planned_with_a_matrix_and_is_the_published_rule_with_a_curve() -> None:
    sigmas = DEMO.sigmas or ()
    config = DiffusionCacheConfig(nfe=9, predictor="linear")
    with_gram = planned(config, DEMO.ratios, DEMO, 28, sigmas).compute
    bare = DEMO.model_copy(update={"gram": None, "output_gram": None})
    with_curve = planned(config, DEMO.ratios, bare, 28, sigmas).compute
    assert sum(with_gram) == sum(with_curve) == 9 and with_gram != with_curve
    rules = (magcache_plan(DEMO.ratios, threshold, 5, 0.1) for threshold in np.geomspace(1e-3, 1, 4000))
    assert with_curve == next(plan for plan in rules if sum(plan) <= 9)


@pytest.mark.parametrize("name", ["flux1-dev-28", "qwen-image-50", "demo"])
def test_a_budget_on_a_curve_is_the_rule_at_a_threshold_that_gives_the_number(name: str) -> None:
    """Exactly so many forwards whatever the number; the published rule itself if it has a plan of that size."""
    curve = shipped_profile(name).ratios
    steps = len(curve)
    sigmas = tuple(np.linspace(1, 1 / steps, steps).tolist())
    of_the_rule: dict[int, set[tuple[bool, ...]]] = {}
    for threshold in np.geomspace(1e-4, 10, 4000):
        plan = magcache_plan(curve, threshold, 5, 0.1)
        of_the_rule.setdefault(sum(plan), set()).add(plan)
    for nfe in range(2, steps + 1):
        plan = planned(DiffusionCacheConfig(nfe=nfe), curve, None, steps, sigmas).compute
        assert sum(plan) == nfe and plan[0] and plan[-1]
        if nfe in of_the_rule:
            assert plan in of_the_rule[nfe], nfe
    assert len(of_the_rule) > steps // 3


# -------------------------------------------------------------------------------------------------------------- presets


def planned_forwards(profile: CacheProfile, steps: int, **settings: Any) -> int:
    sigmas = tuple(np.linspace(1, 1 / steps, steps).tolist())
    return planned(DiffusionCacheConfig(**settings), profile.ratios, profile, steps, sigmas).full_forwards


@pytest.mark.parametrize(("preset", "forwards"), [("high", 19), ("balanced", 14), ("fast", 9)])
def test_a_preset_is_a_speedup_if_the_profile_has_a_matrix_alone(preset: str, forwards: int) -> None:
    matrix = DEMO.model_copy(update={"budgets": ()})
    assert planned_forwards(matrix, 28, preset=preset) == forwards
    bare = matrix.model_copy(update={"gram": None, "output_gram": None})
    rule = magcache_plan(DEMO.ratios, *vars(PRESETS[preset].rule).values())
    assert planned_forwards(bare, 28, preset=preset) == sum(rule)


FIGURES = CacheProfile.from_dict(
    DEMO.model_dump() | {"budgets": [{"speedup": s, "psnr": db, "pairs": 9} for s, db in ((2, 50), (4, 40), (7, 33))]}
)


@pytest.mark.parametrize(
    ("psnr", "steps", "forwards"),
    [(33, 28, 4), (33.1, 28, 7), (40, 28, 7), (45, 28, 14), (50.5, 28, 28), (40, 56, 14), (40, 10, 7), (40, 4, 4)],
)
def test_decibels_are_the_fewest_forwards_that_kept_them(psnr: float, steps: int, forwards: int) -> None:
    """In proportion if a run has more steps than the profile, never fewer; every step if nothing measured kept them."""
    assert planned_forwards(FIGURES, steps, psnr=psnr) == forwards


@pytest.mark.parametrize(("preset", "forwards"), [("high", 14), ("balanced", 7), ("auto", 7), ("fast", 4)])
def test_a_preset_is_decibels_if_the_profile_has_figures(preset: str, forwards: int) -> None:
    assert planned_forwards(FIGURES, 28, preset=preset) == forwards


def test_decibels_without_figures_are_refused() -> None:
    for profile in (None, DEMO.model_copy(update={"budgets": ()})):
        with pytest.raises(InvalidValueError, match=r"psnr needs a profile with figures.*calibrate MODEL.*got 40"):
            budgeted(DiffusionCacheConfig(psnr=40), 28, profile)


def test_a_budget_is_the_published_rule_where_that_was_measured_to_be_nearer() -> None:
    """With as large a share of the steps computed, whatever their number; a mask of one's own is no budget."""
    budgets = [{"speedup": 2.0, "psnr": 45.0}, {"speedup": 4.0, "by_rule": True, "terms": {}, "psnr": 35.0}]
    profile = CacheProfile.from_dict(DEMO.model_dump() | {"budgets": budgets})
    bare = DEMO.curve_alone()
    for steps in (28, 56):
        sigmas = tuple(np.linspace(1, 1 / steps, steps).tolist())
        for settings, by_rule in (
            ({"nfe": steps // 2}, False),
            ({"nfe": steps // 4}, True),
            ({"psnr": 34}, True),
            ({"psnr": 40}, False),
            ({"steps_mask": [step % 4 == 0 for step in range(steps)]}, False),
            ({"nfe": steps // 4, "predictor": "affine"}, False),
        ):
            made = planned(DiffusionCacheConfig(**settings), profile.ratios, profile, steps, sigmas)
            assert (made.predictor == "reuse") == by_rule
            if by_rule:
                rule = planned(DiffusionCacheConfig(nfe=made.full_forwards), bare.ratios, bare, steps, sigmas)
                assert (made.compute, made.terms, made.forecasts) == (rule.compute, rule.terms, rule.forecasts)


def test_the_paper_preset_is_the_published_rule() -> None:
    assert planned_forwards(DEMO, 28, preset="paper") == sum(magcache_plan(DEMO.ratios, 0.24, 5, 0.1, False))


def test_the_default_is_auto_and_rule_settings_replace_a_preset() -> None:
    assert DiffusionCacheConfig().preset == "auto" and DiffusionCacheConfig(predictor="linear").preset == "auto"
    assert DiffusionCacheConfig(mag_threshold=0.24).preset is None and DiffusionCacheConfig(nfe=5).preset is None
    assert DiffusionCacheConfig(preset="fast", mag_threshold=0.1).preset is None
    again = DiffusionCacheConfig.from_dict(DiffusionCacheConfig(preset="high").model_dump())
    assert again == DiffusionCacheConfig(preset="high") and again.mag_max_skip_steps == 1
    with pytest.raises(InvalidValueError, match="nfe and preset each make the plan"):
        DiffusionCacheConfig(nfe=5, preset="fast")


def test_a_mask_is_described_in_runs() -> None:
    config = DiffusionCacheConfig(steps_mask={"compute": [6, 2, 2, 2, 2, 1], "skip": [1, 3, 3, 3, 3]})
    assert config.steps_mask is not None and len(config.steps_mask) == 28 and sum(config.steps_mask) == 15
    assert config.steps_mask[:12] == (*(True,) * 6, False, True, True, False, False, False)
    for bad in ({"compute": [-1]}, {"compute": [10**9]}, {"compute": ["2"]}, {"computed": [1]}, {"skip": [3]}):
        with pytest.raises(InvalidValueError, match="steps_mask"):
            DiffusionCacheConfig(steps_mask=bad)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda flags: [str(flag) for flag in flags]])
def test_a_mask_is_read_from_flags_of_any_kind(kind: Callable[[Any], Any]) -> None:
    assert DiffusionCacheConfig(steps_mask=kind([1, 0, 0])).steps_mask == (True, False, False)
