"""Which schedules are learnt, by what, and what serves them meanwhile: a published curve, other steps, other levels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CURVE, tiny_flux
from teaching import idle_of, learning, learning_of, run_once

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import LEARNT, CacheProfile, find_profiles, load_profile
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, override
from vllm_omni.diffusion.cache.state import PlannedState
from vllm_omni.errors import InvalidValueError
from vllm_omni.learning import MOST_RUNS, MOST_SCHEDULES, REQUESTS, Learning, chosen, covers, replaced

STEPS = 6
pytestmark = pytest.mark.usefixtures("profiles")


def publish(folder: Path, profiles: Path) -> None:
    """A curve without a matrix, known by the name of the model alone, as the published ones are."""
    curve = CacheProfile(
        name="published", transformer_class="FluxTransformer2DModel", ratios=CURVE, models=(str(folder),)
    )
    curve.save(profiles / "published.json")


@pytest.fixture
def omni(folder: Path, profiles: Path) -> Iterator[Omni]:
    publish(folder, profiles)
    with learning(folder) as engine:
        yield engine


def draw(omni: Omni, seed: int = 0, steps: int = STEPS, **more: Any) -> Any:
    size: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent"}
    (output,) = omni.generate("x", Params(num_inference_steps=steps, seed=seed, **size | more), use_tqdm=False)
    assert output.ok, output.error
    return output


def test_a_published_curve_serves_until_idle_time_has_brought_a_matrix(
    omni: Omni, folder: Path, profiles: Path
) -> None:
    idle = idle_of(omni)
    for seed in range(REQUESTS):
        assert not idle.wanted
        output = draw(omni, seed)
        assert output.skipped_steps > 0 and output.cache_settings["profile"] == "published"
    computed, _ = dict(omni.engine.worker.runner.forwards), omni.engine.reports()
    for run in range(REQUESTS):
        assert idle.wanted and idle.progress == f"{run} of {REQUESTS} runs of {STEPS} steps"
        run_once(idle, omni)
    assert omni.engine.worker.runner.forwards == computed and not omni.engine.reports()
    output = draw(omni, 9)
    assert output.skipped_steps > 0 and output.cache_settings["profile"].startswith(f"mine-{STEPS}-")
    assert output.cache_settings["predictor"] == "coherent"
    kept = load_profile(next(profiles.glob("mine-*.json")))
    assert kept.provenance["asked"] == {"num_inference_steps": STEPS, "height": 32, "width": 32}
    assert kept.gains is None
    assert idle.wanted  # gains come next
    assert [p.name for p in find_profiles(str(folder), kept.fingerprint or "")] == [kept.name, "published"]
    with learning(folder) as again:
        assert draw(again).cache_settings["profile"] == kept.name
        assert draw(again, steps=20).cache_settings["profile"] == "published"  # it says nothing of so many steps


def test_a_request_that_may_not_teach_takes_nobodys_place(omni: Omni) -> None:
    for seed in range(REQUESTS):
        draw(omni, seed, sigmas=[0.4 - 0.05 * i for i in range(STEPS)])
    assert not idle_of(omni).wanted and learning_of(omni).to_run() is None


def test_decibels_are_waited_for_until_it_is_given_up(omni: Omni) -> None:
    assert draw(omni, 0, cache={"psnr": 30.0}).skipped_steps == 0
    assert learning_of(omni).progress == f"1 of {REQUESTS} requests of {STEPS} steps"
    for seed in range(REQUESTS):
        draw(omni, seed)
    idle, transformer = idle_of(omni), omni.engine.worker.pipeline.transformer
    forward = transformer.forward

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not today")

    transformer.forward = fail
    idle.begin()
    while omni.engine.has_unfinished_requests():
        assert all(idle.takes(output) for output in omni.engine.step())
    transformer.forward = forward
    assert not idle.wanted and learning_of(omni).over
    (output,) = omni.generate("x", Params(num_inference_steps=STEPS, cache={"psnr": 30.0}), use_tqdm=False)
    assert isinstance(output.error, InvalidValueError) and output.error.field.endswith("psnr")
    assert draw(omni, 1).skipped_steps > 0


def test_what_the_engine_itself_is_set_to_is_not_refused_when_it_is_given_up(folder: Path, profiles: Path) -> None:
    publish(folder, profiles)
    with learning(folder, psnr=30.0) as omni:
        learning_of(omni).over = True
        assert draw(omni).skipped_steps == 0


@pytest.mark.slow
def test_steps_that_a_learnt_profile_says_nothing_of_are_cached_by_its_curve_and_learnt(folder: Path) -> None:
    with learning(folder) as omni:
        for seed in range(REQUESTS):
            assert draw(omni, seed, steps=4).skipped_steps == 0
        assert draw(omni, 7, steps=4).cache_settings["predictor"] == "coherent"
        for seed in range(REQUESTS):
            output = draw(omni, seed, steps=16)
            assert output.skipped_steps > 0 and output.cache_settings["predictor"] == "reuse"
        idle = idle_of(omni)
        for _ in range(REQUESTS):
            assert learning_of(omni).to_run() is not None
            run_once(idle, omni)
        output = draw(omni, 9, steps=16)
        assert output.cache_settings["predictor"] == "coherent" and output.cache_settings["profile"].startswith(
            "mine-16"
        )


def test_a_run_that_does_not_meet_the_schedule_is_not_repeated(omni: Omni) -> None:
    """As of a pipeline that takes its noise levels from the picture it is given."""
    learned = learning_of(omni)
    asked = Schedule(STEPS, tuple(np.linspace(0.7, 0.1, STEPS).tolist()))
    for _ in range(REQUESTS):
        learned.note(asked, {})
    idle = idle_of(omni)
    assert idle.wanted
    run_once(idle, omni)
    assert not idle.wanted and learned.progress == ""


def levels(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    plain = np.linspace(1, 1 / steps, steps)
    return tuple((shift * plain / (1 + (shift - 1) * plain)).tolist())


def learnt(schedule: Schedule, name: str = "learnt", kind: str = LEARNT) -> CacheProfile:
    gram = (np.eye(schedule.steps) * 0.1 + 1).tolist()
    more = {"kind": kind, "switches": list(schedule.switches)}
    return CacheProfile(
        name=name,
        transformer_class="FluxTransformer2DModel",
        ratios=(1.0,) * schedule.steps,
        sigmas=schedule.sigmas,
        gram=tuple(map(tuple, gram)),
        provenance=more,
    )


@pytest.mark.parametrize(
    ("steps", "shift", "switches", "held"),
    [
        (28, 3.0, (), True),
        (20, 3.0, (), True),
        (40, 3.0, (), True),
        (28, 2.5, (), True),
        (50, 3.0, (), False),
        (14, 3.0, (), False),
        (28, 1.0, (), False),
        (28, 3.0, (9,), False),
    ],
)
def test_a_learnt_profile_holds_for_schedules_like_its_own(
    steps: int, shift: float, switches: tuple[int, ...], held: bool
) -> None:
    profile, wanted = learnt(Schedule(28, levels(28))), Schedule(steps, levels(steps, shift), switches)
    assert covers(profile, wanted) is held
    assert covers(learnt(Schedule(28, levels(28)), kind="calibrated"), wanted)
    best = chosen([profile], wanted)
    assert best is not None and (best.gram is not None) is held and best.ratios == profile.ratios


@pytest.mark.parametrize("kind", ["calibrated", LEARNT])
def test_no_profile_holds_for_noise_in_other_units(kind: str) -> None:
    """Of t / T, from 1, and of a variance that explodes, from 157."""
    profile = learnt(Schedule(28, levels(28)), kind=kind)
    loud = Schedule(28, tuple(np.geomspace(157, 0.03, 28).tolist()))
    best = chosen([profile], loud)
    assert not covers(profile, loud) and best is not None and best.gram is None and best.ratios == profile.ratios


def test_four_steps_make_no_step_of_fifty_look_free() -> None:
    assert not covers(learnt(Schedule(4, levels(4))), Schedule(50, levels(50)))
    assert not covers(learnt(Schedule(28, levels(28))), Schedule(28, (*levels(26), 0.01, 0.005)))
    twice = tuple(np.repeat(levels(14), 2).tolist())  # of a scheduler of second order
    assert covers(learnt(Schedule(28, twice)), Schedule(28, twice))


def test_the_nearest_is_chosen_in_steps_then_in_noise_levels() -> None:
    few, near, same = (learnt(Schedule(n, levels(n, s)), f"{n}-{s}") for n, s in ((20, 3.0), (28, 2.8), (28, 3.0)))
    assert chosen([few, near, same], Schedule(28, levels(28))) is same
    assert chosen([few, near, same], Schedule(21, levels(21))) is few
    assert chosen([], Schedule(28, levels(28))) is None


def test_a_calibrated_profile_comes_before_a_learnt_one_of_as_many_steps() -> None:
    mine, fewer = (learnt(Schedule(n, levels(n, 2.8)), "mine", "calibrated") for n in (28, 14))
    met, other = (learnt(Schedule(n, levels(n)), "mine") for n in (28, 20))
    assert chosen([met, mine], Schedule(28, levels(28))) is mine
    learned = Learning("FluxTransformer2DModel", "f" * 32, "mine")
    assert learned.unfinished([met, mine, fewer, other]) is other and learned.unfinished([met, fewer]) is met
    learned.left.add(met)
    assert learned.unfinished([met, fewer]) is None
    more = other.model_copy(update={"gains": (1.0,) * 20})
    assert replaced([met, mine, fewer, other], more) == (met, mine, fewer, more)


def taught(learned: Learning, schedule: Schedule, requests: int = REQUESTS) -> None:
    state = learned.state(schedule, {})
    assert state is not None
    for _ in range(requests):
        gram = np.eye(schedule.steps) + 1
        state._calibration.add("default", schedule.sigmas, (1.0,) * schedule.steps, gram)


def test_schedules_of_as_many_steps_have_files_of_their_own(profiles: Path) -> None:
    learned = Learning("FluxTransformer2DModel", "f" * 32, "some/model")
    for shift in (1.0, 3.0):
        taught(learned, Schedule(8, levels(8, shift)))
    assert len({profile.name for profile in learned.ready()}) == len(list(profiles.glob("model-8-*.json"))) == 2
    assert learned.progress == "" and learned.ready() == []


def test_the_least_advanced_schedule_makes_room() -> None:
    learned = Learning("FluxTransformer2DModel", "f" * 32, "some/model")
    first = Schedule(8, levels(8))
    taught(learned, first, REQUESTS - 1)
    for i in range(2 * MOST_SCHEDULES):
        learned.note(Schedule(8, levels(8, 1.1 + 0.1 * i)), {})
    assert learned.progress == f"{REQUESTS - 1} of {REQUESTS} requests of 8 steps"
    taught(learned, first, 1)
    assert len(learned.ready()) == 1


def test_a_schedule_of_which_no_profile_can_be_made_is_left_alone() -> None:
    learned, schedule = Learning("FluxTransformer2DModel", "f" * 32, "m"), Schedule(8, levels(8))
    for _ in range(REQUESTS):
        learned.note(schedule, {})
    for _ in range(MOST_RUNS):
        found = learned.to_run()
        assert found is not None
        found[1].runs += 1  # one that brings nothing
    assert learned.to_run() is None and learned.progress == ""


def test_ranks_serve_a_model_that_nobody_has_measured_uncached(caplog: pytest.LogCaptureFixture) -> None:
    """Each would learn by its own clock; so none does, and the model is served all the same."""
    pipe = tiny_flux()
    with pytest.raises(InvalidValueError, match="mag_ratios"):
        MagCacheBackend(DiffusionCacheConfig()).enable(pipe)
    backend = MagCacheBackend(DiffusionCacheConfig())
    backend.many_ranks = True
    with torch.inference_mode():
        backend.enable(pipe, standalone=False)
    assert caplog.text.count("served uncached") == 1
    schedule = Schedule(STEPS, levels(STEPS))
    for asked in (None, {"nfe": 3}, {"psnr": 30.0}):
        settings = override(asked, backend.settings)
        assert settings is not None
        backend.check(settings, STEPS)
        assert backend.state(schedule, settings).plan is None
    masked = override({"steps_mask": [1, 0, 0, 1]}, backend.settings)
    assert isinstance(backend.state(schedule, masked), PlannedState)
