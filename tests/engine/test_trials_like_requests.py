"""Trials are like the requests that they are for, or say nothing of them; and they take nothing from anybody."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from families import FAMILIES
from PIL import Image
from pipelines import save_tiny_flux, tiny_wan
from stepping import add, drain
from teaching import SIZE, idle_of, learning, learning_of, learning_over, run_once, teach

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.engine.learning import IDLE_S, PROMPTS
from vllm_omni.engine.loop import EngineLoop
from vllm_omni.engine.wire import Abort, Close, Outputs
from vllm_omni.errors import InvalidValueError, NumericalError
from vllm_omni.learning import REQUESTS, likeness
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.trials import FAR_OFF

STEPS = 5
pytestmark = pytest.mark.usefixtures("profiles")


@pytest.fixture
def omni(folder: Path) -> Iterator[Omni]:
    with learning(folder) as engine:
        yield engine


def test_trials_send_the_strength_and_the_pictures_of_requests(folder: Path) -> None:
    pipeline = FluxImg2ImgPipeline(**FluxPipeline.from_pretrained(folder).components)
    pipeline.set_progress_bar_config(disable=True)
    picture = {"prompt": "red apple", "multi_modal_data": {"image": Image.new("RGB", (32, 48), "green")}}
    with learning_over(pipeline) as omni:
        profile = teach(omni, STEPS, picture, strength=1.0, guidance_scale=2.0)
        asked = profile.provenance["asked"]
        assert asked["strength"] == 1.0 and asked["guidance_scale"] == 2.0 and asked["num_inference_steps"] == STEPS
        assert asked["pictures"] == {"image": [32, 48]}
        idle = idle_of(omni)
        for _ in range(3):
            run_once(idle, omni)
        assert idle.progress.startswith("gains: 2 of ") and not learning_of(omni).left


@pytest.mark.parametrize("lines", ["cherry\n\ncat\npear\ncow\n", None], ids=["captions", "none"])
def test_trials_draw_what_the_model_says_that_it_can_draw(tmp_path: Path, lines: str | None) -> None:
    mine = save_tiny_flux(tmp_path / "mine")
    if lines is not None:
        (mine / "captions.txt").write_text(lines)
    drawn = set()
    with learning(mine) as omni:
        teach(omni, STEPS)
        idle = idle_of(omni)
        for _ in range(3):
            idle.begin()
            (entry,) = omni.engine._entries.values()
            drawn.add(entry.request.prompt["prompt"])
            while omni.engine.has_unfinished_requests():
                assert all(idle.takes(output) for output in omni.engine.step())
    assert drawn <= ({"cherry", "pear"} if lines else set(PROMPTS))


def test_a_profile_whose_schedule_trials_do_not_meet_is_left_alone(
    omni: Omni, caplog: pytest.LogCaptureFixture
) -> None:
    profile = teach(omni, STEPS)
    other = profile.provenance | {"asked": profile.provenance["asked"] | {"num_inference_steps": STEPS - 1}}
    learner = omni.engine.worker.learner
    assert learner is not None
    learner.profiles = (profile.model_copy(update={"provenance": other}),)
    idle = idle_of(omni)
    run_once(idle, omni)
    assert "is another than the profile's" in caplog.text
    assert not idle.wanted and not learning_of(omni).over and idle.progress == ""
    teach(omni, 2 * STEPS)
    assert idle.wanted  # another schedule is another matter
    (output,) = omni.generate("x", Params(num_inference_steps=STEPS, cache={"psnr": 30.0}, **SIZE), use_tqdm=False)
    assert isinstance(output.error, InvalidValueError) and output.error.field.endswith("psnr")


def test_a_boundary_of_ones_own_teaches_nothing() -> None:
    wan = next(family for family in FAMILIES if family.name.startswith("Wan 2.2 (two"))
    pipeline = wan.build()
    pipeline.register_to_config(boundary_ratio=0.875)
    config = {"calibrate": "auto"}
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=config, defaults=wan.settings) as omni:
        for boundary, taught in ((0.5, False), (None, True)):
            params = Params(num_inference_steps=4, boundary_ratio=boundary, output_type="latent")
            (output,) = omni.generate(wan.prompt(0), params, use_tqdm=False)
            assert output.ok and (output.cache_settings or {}).get("calibrate", False) is taught


def test_what_holds_no_numbers_is_far_away_and_the_reference_ends_all(omni: Omni) -> None:
    teach(omni, STEPS)
    idle = idle_of(omni)

    def spoil(output: OmniRequestOutput) -> None:
        if output.plan is not None:
            output.error, output.latents = NumericalError(), None

    for _ in range(3):
        run_once(idle, omni, spoil)
    assert not learning_of(omni).over and FAR_OFF <= idle._results[-1].squared < float("inf")
    idle.forget()
    run_once(idle, omni, lambda output: vars(output).update(error=NumericalError()))
    assert learning_of(omni).over and not idle.wanted


def test_a_sampler_with_noise_of_its_own_gets_a_matrix_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    kind = FlowMatchEulerDiscreteScheduler
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, stochastic_sampling=True)
    with learning_over(pipeline) as omni:
        profile = teach(omni, STEPS)
        idle = idle_of(omni)
        run_once(idle, omni)
        assert idle.wanted
        run_once(idle, omni)
        assert "FlowMatchEulerDiscreteScheduler" in caplog.text and "draws noise" in caplog.text
        assert not idle.wanted and not learning_of(omni).over and profile.gram is not None
        (output,) = omni.generate("x", Params(num_inference_steps=STEPS, **SIZE), use_tqdm=False)
        assert output.skipped_steps > 0


def test_a_scheduler_of_second_order_teaches() -> None:
    pipeline = tiny_wan()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    with learning_over(pipeline) as omni:
        profile = teach(omni, STEPS, num_frames=5)
        assert len(profile.ratios) == 2 * STEPS - 1 and profile.provenance["asked"]["num_frames"] == 5
        idle = idle_of(omni)
        for _ in range(3):
            run_once(idle, omni)
        assert idle.progress.startswith("gains: 2 of ")


def test_trials_count_nowhere(folder: Path) -> None:
    with learning(folder) as omni:
        omni.engine.worker.runner.prompts._max_bytes = 2**20
        teach(omni, STEPS)
        runner = omni.engine.worker.runner
        runner.clock.poll()

        def counted() -> Any:
            prompts, paces = runner.prompts, runner.pace._sizes.values()
            times = [(one.computed.count, one.skipped.count, one.coding.count) for one in paces]
            return prompts.hits, prompts.misses, prompts.bytes, times

        before, idle = counted(), idle_of(omni)
        assert before[1] > 0 and before[3]
        for _ in range(3):
            run_once(idle, omni)
        runner.clock.poll()
        assert counted() == before


def test_a_trial_makes_room_for_who_comes_and_is_made_again(folder: Path) -> None:
    with learning(folder, memory_budget_mb=4.0) as omni:
        teach(omni, STEPS)
        store, idle = omni.engine.worker.store, idle_of(omni)
        for _ in range(2):
            run_once(idle, omni)
        idle.begin()
        while not store.used:
            assert not [idle.takes(output) for output in omni.engine.step()]
        add(omni, "real", "penguin", Params(num_inference_steps=STEPS, **SIZE, cache="off"))
        assert [idle.takes(output) for output in omni.engine.step()] == [True] and not store.used
        drain(omni, {})
        for count in (2, 3):
            run_once(idle, omni)
            assert idle.progress.startswith(f"gains: {count} of ") and idle._repeats == 0


def test_a_run_that_was_cut_short_is_not_counted(omni: Omni) -> None:
    teach(omni, STEPS)
    for seed in range(REQUESTS):
        omni.generate("x", Params(num_inference_steps=2 * STEPS, seed=seed, **SIZE), use_tqdm=False)
    found, idle = learning_of(omni).to_run(), idle_of(omni)
    assert found is not None
    idle.begin()
    idle.stop()
    assert all(idle.takes(output) for output in omni.engine.collect())
    assert found[1].runs == 0
    run_once(idle, omni)
    assert found[1].runs == 1 and found[1].calibration.requests == 1


def test_seconds_wait_for_a_curve(omni: Omni) -> None:
    (output,) = omni.generate("x", Params(num_inference_steps=STEPS, cache={"seconds": 9.0}, **SIZE), use_tqdm=False)
    assert output.ok and output.skipped_steps == 0


def test_of_a_request_numbers_and_sizes_are_noted() -> None:
    small, large = Image.new("RGB", (8, 16)), Image.new("RGB", (32, 16))
    asked = likeness(
        {
            "prompt": "a secret",
            "negative_prompt": "another",
            "prompt_embeds": torch.ones(1, 2),
            "video_length": 17,
            "guidance_scale": 3.5,
            "true_cfg_scale": 4,
            "guidance_scale_2": None,
            "output_type": "pil",
            "image": [small, large],
            "mask_image": small,
            "latents": np.ones(3),
        }
    )
    assert asked == {
        "num_inference_steps": None,
        "num_frames": 17,
        "guidance_scale": 3.5,
        "true_cfg_scale": 4,
        "negative_prompt": " ",
        "pictures": {"image": [[8, 16], [32, 16]], "mask_image": [8, 16]},
    }


class _Commands:
    """Commands of which one comes after so many waits; notes how long the loop waits for each."""

    def __init__(self, *after: tuple[int, Any]) -> None:
        self.waits, self._after = list[float](), deque(after)

    def get(self, block: bool, timeout: float | None) -> Any:
        if block:
            self.waits.append(timeout or 0.0)
            time.sleep(timeout or 0.0)
        if not self._after or len(self.waits) < self._after[0][0]:
            raise queue.Empty
        return self._after.popleft()[1]


def test_a_trial_follows_another_at_once_and_a_command_after_a_rest(omni: Omni) -> None:
    teach(omni, STEPS)
    commands, sent = _Commands((4, Abort([])), (7, Close())), list[Any]()
    loop = EngineLoop(omni.engine, commands, sent.append)  # type: ignore[arg-type]
    loop.learning = idle_of(omni)
    loop.run()
    rests = [IDLE_S, 0, 0, 0, IDLE_S, 0, 0]
    assert commands.waits == pytest.approx(rests, abs=IDLE_S / 2) and commands.waits.count(0.0) == 5
    assert loop.learning._results and not any(isinstance(event, Outputs) for event in sent)
