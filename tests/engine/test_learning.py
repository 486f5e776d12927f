"""A checkpoint without a profile: served uncached, learnt from its own requests, finished while nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import add, drain
from teaching import learning

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.profile import CacheProfile, load_profile
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.engine.describe import describe
from vllm_omni.engine.learning import GAIN_PROMPTS, JUDGED_ON, PROMPTS, TUNED_ON, IdleLearning
from vllm_omni.errors import InvalidValueError
from vllm_omni.learning import MOST_SCHEDULES, REQUESTS

STEPS = 4


@pytest.fixture
def omni(folder: Path, profiles: Path) -> Iterator[Omni]:
    with learning(folder) as engine:
        yield engine


def asked(seed: int = 0, steps: int = STEPS, **more: Any) -> Params:
    size: dict[str, Any] = {"height": 32, "width": 32}
    return Params(num_inference_steps=steps, seed=seed, output_type="latent", **size | more)


def draw(omni: Omni, params: Params, prompt: str = "red apple") -> Any:
    (output,) = omni.generate(prompt, params, use_tqdm=False)
    assert output.ok, output.error
    return output


def learn(omni: Omni, steps: int = STEPS) -> CacheProfile:
    for seed in range(REQUESTS):
        draw(omni, asked(seed, steps))
    learner = omni.engine.worker.learner
    assert learner is not None
    profile = learner.learn()
    assert profile is not None
    return profile


def test_the_first_requests_are_those_without_a_cache_and_the_next_is_cached(omni: Omni, profiles: Path) -> None:
    for seed in range(REQUESTS):
        output = draw(omni, asked(seed))
        assert output.skipped_steps == 0 and output.cache_settings["calibrate"]
        assert torch.equal(output.latents, draw(omni, asked(seed, cache="off")).latents)
    output = draw(omni, asked(9))
    assert output.skipped_steps > 0 and output.cache_settings["profile"].startswith(f"mine-{STEPS}-")
    (file,) = profiles.glob("*.json")
    kept = load_profile(file)
    assert len(kept.ratios) == STEPS and kept.gram is not None and kept.gains is None and kept.output_gram is not None
    assert "prompts_sha256" not in kept.provenance and kept.provenance["kind"] == "learnt"


def test_what_was_learnt_is_there_after_a_restart(folder: Path, profiles: Path) -> None:
    with learning(folder) as omni:
        learn(omni)
    with learning(folder) as omni:
        assert draw(omni, asked()).skipped_steps > 0


def test_requests_in_one_batch_teach_as_much_as_those_one_by_one(folder: Path, profiles: Path) -> None:
    def gram(together: bool) -> torch.Tensor:
        with learning(folder) as omni:
            for seed in range(REQUESTS):
                add(omni, f"{seed}", "red apple", asked(seed))
                if not together:
                    drain(omni, {})
            outputs = drain(omni, {})
            assert all(output.ok for output in outputs.values())
            learner = omni.engine.worker.learner
            assert learner is not None
            profile = learner.learn()
            assert profile is not None
        for file in profiles.glob("*.json"):
            file.unlink()
        return torch.tensor(profile.gram)

    one, other = gram(False), gram(True)
    assert (one - other).abs().max() < 1e-4 * one.abs().max()


def test_only_whole_runs_of_one_schedule_count(omni: Omni) -> None:
    learner = omni.engine.worker.learner
    assert learner is not None and learner.learning is not None
    for seed in range(REQUESTS - 1):
        draw(omni, asked(seed))
    add(omni, "gone", "red apple", asked(7))
    for _ in range(2):
        omni.engine.step()
    omni.engine.abort(["gone"])
    drain(omni, {})
    draw(omni, asked(8, steps=STEPS + 1))
    assert learner.learn() is None
    assert learner.learning.progress == f"{REQUESTS - 1} of {REQUESTS} requests of 4 steps, 1 of 4 requests of 5 steps"
    draw(omni, asked(9))
    assert learner.learn() is not None


def test_schedules_of_ones_own_take_no_memory_without_end(omni: Omni) -> None:
    for steps in range(2, 4 + MOST_SCHEDULES):
        draw(omni, asked(steps=steps))
    learner = omni.engine.worker.learner
    assert learner is not None and learner.learning is not None
    assert learner.learning.progress.count("requests") == MOST_SCHEDULES


def test_a_budget_waits_and_is_then_kept_or_refused(omni: Omni) -> None:
    assert draw(omni, asked(cache={"nfe": 3})).skipped_steps == 0
    learn(omni)
    assert draw(omni, asked(cache={"nfe": 3})).computed_steps == 3
    (output,) = omni.generate("red apple", asked(cache={"nfe": 99}), use_tqdm=False)
    assert isinstance(output.error, InvalidValueError) and output.error.field == "nfe"


def test_a_mask_needs_nothing_learnt(omni: Omni) -> None:
    assert draw(omni, asked(cache={"steps_mask": [1, 0, 0, 1]})).skipped_steps == 2


def test_without_the_setting_it_is_refused_with_the_way_out(folder: Path, profiles: Path) -> None:
    with pytest.raises(InvalidValueError, match="calibrate='auto'"):
        learning(folder, calibrate="off")


def finish(idle: IdleLearning, engine: DiffusionEngine, disturb: Any = lambda n: None) -> int:
    """Make trials until none is wanted; returns how many."""
    count = 0
    while idle.wanted:
        idle.begin()
        count += 1
        disturb(count)
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert idle.takes(output) or output.ok
    return count


def test_what_is_measured_has_prompts_of_its_own() -> None:
    assert GAIN_PROMPTS + TUNED_ON + JUDGED_ON <= len(PROMPTS) == len(set(PROMPTS))


@pytest.mark.slow
def test_idle_time_brings_gains_and_decibels_whoever_comes_between(
    folder: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("GAIN_PROMPTS", 1), ("TUNED_ON", 2), ("JUDGED_ON", 5)):
        monkeypatch.setattr(f"vllm_omni.engine.learning.{name}", few)

    def complete(busy: bool) -> CacheProfile:
        with learning(folder) as omni:
            learn(omni)
            idle = IdleLearning(omni.engine, describe(omni.engine, {}))
            before = dict(omni.engine.worker.runner.forwards)
            omni.engine.reports()

            def disturb(count: int) -> None:
                if busy and count % 9 == 0:
                    for _ in range(3):
                        omni.engine.step()
                    add(omni, f"real-{count}", "penguin", asked(count, cache="off"))
                    running = list(omni.engine.scheduler.idle)
                    steps = [omni.engine._entries[name].running.step for name in running]  # type: ignore[union-attr]
                    assert omni.engine.progress()[:1] == [] and len(omni.engine.scheduler) == 1
                    while f"real-{count}" in omni.engine._entries:
                        omni.engine.step()
                    assert [omni.engine._entries[name].running.step for name in running] == steps  # type: ignore[union-attr]

            assert finish(idle, omni.engine, disturb) > 15
            assert busy or (omni.engine.worker.runner.forwards == before and not omni.engine.reports())
            (profile,) = omni.engine.worker.learner.profiles  # type: ignore[union-attr]
            assert draw(omni, asked(cache={"psnr": min(b.psnr for b in profile.budgets)})).skipped_steps > 0
        (file,) = profiles.glob("*.json")
        assert load_profile(file).model_dump_json() == profile.model_dump_json() and profile.lacks == []
        file.unlink()
        return profile

    quiet, busy = complete(False), complete(True)
    assert quiet.gains == busy.gains and quiet.budgets == busy.budgets


def test_a_trial_that_fails_is_the_last_and_nobody_elses_trouble(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(omni)
    idle = IdleLearning(omni.engine, describe(omni.engine, {}))
    transformer = omni.engine.worker.pipeline.transformer

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not today")

    with monkeypatch.context() as patched:
        patched.setattr(transformer, "forward", fail)
        finish(idle, omni.engine)
    assert not idle.wanted
    assert draw(omni, asked(5)).skipped_steps > 0


def test_other_weights_are_learnt_anew(omni: Omni) -> None:
    learn(omni)
    idle = IdleLearning(omni.engine, describe(omni.engine, {}))
    with torch.no_grad():
        omni.engine.worker.pipeline.transformer.x_embedder.weight.mul_(1.5)
    omni.engine.worker.weights_changed()
    idle.forget()
    assert not idle.wanted  # the old profile says nothing of the new weights
    assert draw(omni, asked(3)).skipped_steps == 0
    for seed in range(REQUESTS):
        draw(omni, asked(seed))
    assert draw(omni, asked(9)).skipped_steps > 0
