"""Weights that are tuned to where a run ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from vllm_omni.diffusion.cache.plan import planner
from vllm_omni.diffusion.cache.plan.compose import CachePlan, good_plans
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile, MeasuredBudget
from vllm_omni.trials import FAR_OFF, Away, Measurement, Trial
from vllm_omni.tuning import MOVED, Shift, _lost, _shifted, _shifts, _widened, amounts_of, solve, tuned_weights

STEPS, NUMBERS = 8, 300
SIGMAS = tuple(np.linspace(1, 0.1, STEPS).tolist())
SCHEDULE = Schedule(STEPS, SIGMAS)


@pytest.fixture(autouse=True)
def one_budget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And one plan for it."""
    monkeypatch.setattr("vllm_omni.trials.SPEEDUPS", (2.0,))
    monkeypatch.setattr(planner, "GOOD", 1)
    good_plans.cache_clear()
    yield
    good_plans.cache_clear()


def profile() -> CacheProfile:
    vectors = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 8)), axis=0)
    gram = tuple(map(tuple, (vectors @ vectors.T).tolist()))
    older = (MeasuredBudget(speedup=2.0, psnr=30.0, pairs=4),)
    return CacheProfile(name="x", transformer_class="X", ratios=(1.0,) * STEPS, sigmas=SIGMAS, gram=gram, budgets=older)


class World:
    """A model whose end moves by each weight of each step in a direction of its own, and by what each prompt adds."""

    def __init__(self, best: dict[int, Any], own: float = 0.0) -> None:
        rng = np.random.default_rng(1)
        self.best = {(step, anchor): weight for step, terms in best.items() for anchor, weight in terms}
        self.common = {key: rng.standard_normal(NUMBERS) for key in self.best}
        self.own, self.rng = own, rng
        self.left: dict[int, np.ndarray] = {}

    def run(self, trial: Trial) -> Away:
        plan = trial.plan(SCHEDULE) if trial.plan else None
        assert plan is not None
        given = {(step, anchor): weight for step, terms in plan.terms.items() for anchor, weight in terms}
        assert all(sum(weight for _, weight in terms) == pytest.approx(1.0, abs=1e-4) for terms in plan.terms.values())
        off = {key: given.get(key, 0.0) - weight for key, weight in self.best.items()}
        left = self.left.setdefault(trial.prompt, self.own * self.rng.standard_normal(NUMBERS))
        moved = left + sum((1 + trial.prompt) * weight * self.common[key] for key, weight in off.items())
        return Away(float(np.mean(moved**2)) + 1e-9, 1.0, moved / NUMBERS**0.5 if trial.kept else None)


def finished(measurement: Any, world: World) -> CacheProfile:
    while isinstance(measurement, Measurement):
        measurement = measurement.read([world.run(trial) for trial in measurement.trials])
    assert isinstance(measurement, CacheProfile)
    return measurement


def untuned_terms() -> dict[int, Any]:
    measurement = tuned_weights(profile(), 3)
    plan = measurement.trials[0].plan
    assert plan is not None
    return plan(SCHEDULE).terms


def test_the_weights_under_which_runs_end_where_they_should_are_found() -> None:
    """Whatever the prompts, each of which is off by another amount; figures of the old weights are gone."""
    widened = _widened(CachePlan.of(_mask(), untuned_terms()), ())
    best: dict[int, Any] = {}
    for step, own in widened.items():
        shares = np.linspace(-0.4, 1.0, len(own)) if len(own) > 1 else np.ones(1)
        best[step] = [(anchor, share) for (anchor, _), share in zip(own, shares / shares.sum(), strict=True)]
    found = finished(tuned_weights(profile(), 6), World(best))
    (budget,) = found.budgets
    assert found.tuned and budget.terms and budget.psnr is None and budget.pairs == 0
    before, after = (
        np.array([abs(dict(own[step]).get(anchor, 0.0) - weight) for step in best for anchor, weight in best[step]])
        for own in (untuned_terms(), budget.terms)
    )
    assert before.max() > 0.2 and after.max() < 0.15 * before.max()  # the ridge keeps a tenth


def _mask() -> tuple[bool, ...]:
    plan = tuned_weights(profile(), 3).trials[0].plan
    assert plan is not None
    return plan(SCHEDULE).compute


def test_weights_that_are_right_already_stay_about_what_they_are() -> None:
    """What is left of each prompt's error is its own, and what helps one helps no other."""
    terms = finished(tuned_weights(profile(), 6), World(untuned_terms(), own=1.0)).budgets[0].terms or untuned_terms()
    moved = [abs(dict(terms[step]).get(anchor, 0.0) - w) for step, own in untuned_terms().items() for anchor, w in own]
    assert max(moved) < 0.3


@pytest.mark.parametrize(("worse", "rule"), [(2.0, 3.0), (FAR_OFF, 3.0), (0.5, 0.1), (2.0, 0.1)])
def test_the_nearest_is_taken(worse: float, rule: float) -> None:
    """Tuned weights may turn out farther away, as where a small shift says nothing of a large one; one run that ends in
    no numbers is enough. The published rule may be nearer than either."""
    world = World({step: ((own[-1][0], 1.0),) for step, own in untuned_terms().items()})
    weights: Any = tuned_weights(profile(), 6).read([Away(1.0, 1.0)] * 6)
    compared = weights.read([world.run(trial) for trial in weights.trials])
    (budget,) = compared.read([Away(worse, 1.0), Away(rule, 1.0)] * 6).budgets
    assert budget.terms == {} and budget.by_rule == (rule < 1)


@pytest.mark.parametrize("prompts", [1, 2, 6, 10])
def test_prompts_are_compared_with_weights_that_they_have_not_given(prompts: int) -> None:
    stage, world = tuned_weights(profile(), prompts, first=3), World(untuned_terms(), own=1.0)
    assert stage.name == "plans" and [trial.prompt for trial in stage.trials] == [*range(3, 3 + prompts)]
    stage = stage.read([world.run(trial) for trial in stage.trials])  # type: ignore[assignment]
    if prompts == 1:  # it would be compared with weights of its own
        assert stage.name == "weights, compared"
        untuned = stage.trials[0].plan
        assert untuned and untuned(SCHEDULE).terms == untuned_terms()
        (budget,) = stage.read([Away(1.0, 1.0), Away(0.5, 1.0)]).budgets  # type: ignore[union-attr]
        assert budget.terms == {} and budget.by_rule  # of both, that much it can say
        return
    assert all(trial.kept and not trial.picture for trial in stage.trials)
    assert {trial.prompt for trial in stage.trials} == set(range(3, 3 + min(prompts, 8)))
    found: Any = stage.read([world.run(trial) for trial in stage.trials])
    plans = {trial.prompt: trial.plan(SCHEDULE).terms for trial in found.trials[::2]}
    assert [trial.prompt for trial in found.trials[::2]] == list(range(3, 3 + prompts))
    assert len({str(terms) for terms in plans.values()}) == min(prompts, 9)  # one for all that gave none


@pytest.mark.parametrize("steps", [1, 2])
def test_runs_without_anything_to_skip_have_no_budgets(steps: int) -> None:
    gram = tuple(map(tuple, np.eye(steps).tolist()))
    bare = CacheProfile(name="x", transformer_class="X", ratios=(1.0,) * steps, sigmas=SIGMAS[:steps], gram=gram)
    assert finished(tuned_weights(bare, 3), World({})).budgets == ()


def test_runs_of_many_steps_are_not_tuned() -> None:
    gram = tuple(map(tuple, np.eye(102).tolist()))
    sigmas = tuple(np.linspace(1, 0.01, 102).tolist())
    bare = CacheProfile(name="x", transformer_class="X", ratios=(1.0,) * 102, sigmas=sigmas, gram=gram)
    stage: Any = tuned_weights(bare, 3)
    assert len(stage.trials) == 3  # one plan, the rule's
    assert stage.read([Away(1.0, 1.0)] * 3).name == "weights, compared"


def test_each_budget_takes_the_plan_that_ends_nearest_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several budgets, with different numbers of plans, whose prompts disagree."""
    monkeypatch.setattr("vllm_omni.trials.SPEEDUPS", (1.25, 1.5, 2.0, 3.0, 5.5))
    monkeypatch.setattr(planner, "GOOD", 6)
    monkeypatch.setattr(planner, "NEARLY", 1e9)
    good_plans.cache_clear()
    stage: Any = tuned_weights(profile(), 3)
    rng = np.random.default_rng(0)
    decibels = rng.normal(40, 5, len(stage.trials))
    expected: dict[int, dict[Any, float]] = {}
    for trial, value in zip(stage.trials, decibels, strict=True):
        mask = trial.plan(SCHEDULE).compute
        own = expected.setdefault(sum(mask), {})
        own[mask] = own.get(mask, 0.0) + value
    assert len({len(own) for own in expected.values()}) > 2 and max(map(len, expected.values())) == 6
    weights = stage.read([Away(10 ** (-value / 10), 1.0) for value in decibels])
    found = {trial.plan(SCHEDULE).compute for trial in weights.trials}
    assert found == {max(own, key=own.__getitem__) for own in expected.values()}


def test_a_prompt_is_compared_with_the_rule_under_the_plan_that_the_others_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a plan that one prompt alone likes would win: the other two are nearer by the rule."""
    monkeypatch.setattr(planner, "GOOD", 2)
    monkeypatch.setattr(planner, "NEARLY", 1e9)
    good_plans.cache_clear()
    stage: Any = tuned_weights(profile(), 3)
    rng = np.random.default_rng(0)
    weights = stage.read([Away(10 ** (-dB / 10), 1.0) for dB in (40.0, 60.0, 40.0, 39.5, 40.0, 39.5)])
    compared = weights.read([Away(1.0, 1.0, rng.standard_normal(NUMBERS)) for _ in weights.trials])
    (budget,) = compared.read([Away(10 ** (-dB / 10), 1.0) for dB in (30.0, 41.0)] * 3).budgets
    assert budget.by_rule and budget.terms == {}


@pytest.mark.parametrize("tuned", [2.0, 0.2])
def test_of_plans_about_as_good_the_one_that_ends_nearest_is_taken(
    tuned: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget stores its terms, tuned or not: the planner alone would choose another mask."""
    monkeypatch.setattr(planner, "GOOD", 3)
    monkeypatch.setattr(planner, "NEARLY", 1e9)
    good_plans.cache_clear()
    stage: Any = tuned_weights(profile(), 3)
    masks = [trial.plan(SCHEDULE).compute for trial in stage.trials]
    assert len(set(masks[:3])) == 3 and masks == masks[:3] * 3 and masks[0] == _mask()
    untuned = stage.trials[1].plan(SCHEDULE).terms
    weights = stage.read([Away(0.5 if mask == masks[1] else 1.0, 1.0) for mask in masks])
    rng = np.random.default_rng(0)
    compared = weights.read([Away(1.0, 1.0, rng.standard_normal(NUMBERS)) for _ in weights.trials])
    (budget,) = compared.read([Away(one, 1.0) for one in (tuned, 3.0)] * 3).budgets
    assert tuple(step not in budget.terms for step in range(STEPS)) == masks[1] and not budget.by_rule
    assert (budget.terms == untuned) == (tuned > 0.5)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_runs_that_end_in_no_numbers_give_no_weights(value: float | None) -> None:
    good = Away(1.0, 1.0, np.ones(3))
    bad = good._replace(moved=None if value is None else np.array([1.0, value, 1.0]))
    assert amounts_of([[good, bad], [good, good]], [4]) == []
    assert amounts_of([[good], [good]], []) == []  # and neither do plans with nothing to choose
    exact = good._replace(moved=np.zeros(3))
    assert [float(one[0]) for one in amounts_of([[exact] * 2] * 2, [4])] == [0.0, 0.0, 0.0]


def test_weight_moves_between_the_anchors_of_one_denoiser() -> None:
    plan = CachePlan.of((True, True, False, True, True, False, False, True), {2: ((1, 1.0),), 5: ((4, 1.0),), 6: ()})
    widened = _widened(plan, (3,))
    assert widened == {2: ((0, 0.0), (1, 1.0)), 5: ((3, 0.0), (4, 1.0)), 6: ((3, 0.0), (4, 0.0))}
    assert _shifts(widened) == [Shift(2, 1, 0), Shift(5, 4, 3), Shift(6, 4, 3)]
    moved = _shifted(plan, (3,), {Shift(5, 4, 3): MOVED})
    assert moved.terms == {2: ((1, 1.0),), 5: ((3, 0.1), (4, 0.9)), 6: ((4, 0.0),)}


@pytest.mark.parametrize(
    ("decibels", "lost"),
    [((-11, 3, 2, 5, -3, -1, 0, 1), False), ((-2, -1, -3, -2), True), ((3.0, 1.0), False)],
)
def test_weights_are_left_if_prompts_lose_by_more_than_chance(decibels: tuple[float, ...], lost: bool) -> None:
    assert _lost(np.array(decibels)) is lost


def test_each_prompt_counts_by_decibels() -> None:
    """One that is a hundred times as far away does not decide alone."""
    ends = np.array([[[-1.0, 100.0], [1.0, 0.0]], [[100.0, -3.0], [0.0, 1.0]]])  # prompts, (end, by the shift), numbers
    heavier = ends * [[[1.0]], [[10.0]]]
    even, weighed = (solve(one @ one.transpose(0, 2, 1), [0], 0.0) for one in (ends, heavier))
    assert even[0] == pytest.approx(weighed[0], rel=1e-3)
