"""Runs that begin in the middle of a schedule, that change denoisers, and outputs that take several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from gating import asked as gated
from PIL import Image
from pipelines import CURVE, DEFAULTS, embeds, tiny_flux
from stepping import add
from zoo import ZOO

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.calibration import Calibration
from vllm_omni.diffusion.cache.gates.seacache import grid_of
from vllm_omni.diffusion.cache.plan.compose import compose
from vllm_omni.diffusion.cache.plan.rule import magcache_plan
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.diffusion.cache.settings import parse
from vllm_omni.diffusion.cache.state import Kept
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.step_tracker import schedule_of
from vllm_omni.diffusion.worker.pace import size_of
from vllm_omni.errors import InvalidValueError

RULE = {"mag_threshold": 0.12, "mag_max_skip_steps": 3, "mag_retention_ratio": 0.1}


@pytest.mark.parametrize("total", [28, 20])
def test_an_edit_is_planned_by_the_end_of_the_curve(total: int) -> None:
    settings = parse("magcache", DiffusionCacheConfig(mag_ratios=CURVE, curve_resampling="nearest", **RULE))
    sigmas = tuple(1 - step / total for step in range(total))
    whole = compose(settings, CURVE, None, Schedule(total, sigmas))
    half = compose(settings, CURVE, None, Schedule(total // 2, sigmas[total // 2 :], left_out=total // 2))
    assert len(whole.compute) == total and len(half.compute) == total // 2
    if total == len(CURVE):
        assert half.compute == magcache_plan(CURVE[total // 2 :], 0.12, 3, 0.1)
    assert half.compute != compose(settings, CURVE, None, Schedule(total // 2, sigmas[total // 2 :])).compute


def test_a_pipeline_says_how_much_of_its_schedule_is_left_out() -> None:
    from diffusers import FluxImg2ImgPipeline

    parts = tiny_flux().components
    pipe = FluxImg2ImgPipeline(**{name: part for name, part in parts.items() if "encoder_" not in name or part is None})
    pipe.set_progress_bar_config(disable=True)
    for strength, steps in ((0.5, 10), (0.3, 6), (1.0, 20)):
        picture = Image.effect_noise((32, 32), 90).convert("RGB")
        call: dict[str, Any] = {"image": picture, "strength": strength, "num_inference_steps": 20}
        pipe(**call, **embeds(0), **DEFAULTS, output_type="latent")
        schedule = schedule_of(pipe)
        assert (schedule.steps, schedule.left_out) == (steps, 20 - steps)


def test_noise_levels_that_rise_are_read_as_falling_ones() -> None:
    """Mochi's scheduler counts from 0, all noise, to 1."""
    mochi = next(family for family in FAMILIES if family.name == "Mochi").build()
    mochi.scheduler.register_to_config(invert_sigmas=True)
    mochi.scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2])
    vars(mochi)["_num_timesteps"] = 4
    assert schedule_of(mochi).sigmas == pytest.approx((1.0, 0.8, 0.5, 0.2), abs=1e-6)


def test_a_scheduler_without_a_config_has_a_schedule() -> None:
    class Bare:
        timesteps, sigmas = torch.tensor([900.0, 500.0]), torch.tensor([0.9, 0.5, 0.0])

    class Pipeline:
        def __init__(self) -> None:
            self.scheduler = Bare()

    schedule = schedule_of(Pipeline())
    assert schedule.steps == 2 and schedule.sigmas == pytest.approx((0.9, 0.5)) and schedule.left_out == 0


@pytest.mark.parametrize("backend", ["magcache", "easycache", "fbcache"])
def test_what_was_kept_of_an_expert_is_given_back_when_the_other_takes_over(backend: str) -> None:
    family = next(family for family in FAMILIES if family.name.startswith("Wan 2.2 (two"))
    cache = (
        {"steps_mask": [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1]}
        if backend == "magcache"
        else gated(backend) | {"rel_l1_thresh": 1e3}
    )
    known = {"mag_ratios": CURVE} if backend == "magcache" else {}
    params = Params(num_inference_steps=12, seed=0, output_type="latent", guidance_scale=3.0, cache=cache)
    held: dict[int, set[str]] = {}
    with Omni.from_pipe(family.build(), cache_backend=backend, defaults=family.settings, cache_config=known) as omni:
        add(omni, "a", family.prompt(0), params)
        while omni.engine.has_unfinished_requests():
            (output,) = omni.engine.step() or (None,)
            entry = omni.engine._entries.get("a")
            if entry is None or entry.running is None or entry.running.schedule is None:
                continue
            state, step = entry.running.cache, entry.running.step
            kept = [*state._residuals.items(), *state._memory.items()]
            held.setdefault(step, set()).update(name for (name, _), buffer in kept if len(buffer))
            (switch,) = entry.running.schedule.switches
        assert output is not None and output.ok and output.skipped_steps > 0
    assert any("transformer" in names for step, names in held.items() if step <= switch)
    assert all("transformer" not in names for step, names in held.items() if step > switch + 1)


def test_steps_of_all_runs_of_one_output_are_counted() -> None:
    family = next(family for family in ZOO if family.name == "FramePack")
    pipe, calls = family.build(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with Omni.from_pipe(pipe, defaults=family.settings) as omni:
        for _ in range(2):  # the first is examined, too
            calls.clear()
            (output,) = omni.generate([family.prompt(0)], Params(num_inference_steps=3, seed=1), use_tqdm=False)
            assert output.ok, output.error
    assert output.num_inference_steps == 3 < output.computed_steps
    assert output.computed_steps == len(calls)


def test_a_picture_is_laid_out_by_its_positions_and_not_by_a_square_number_of_tokens() -> None:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(16), indexing="ij")
    ids = torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], dim=1)
    assert grid_of(64, {"img_ids": ids}) == (4, 16) and grid_of(64, {}) == (8, 8)
    beside = ids.clone()
    beside[32:, 0] = 1  # half of the tokens are of a reference picture
    with pytest.raises(InvalidValueError, match="another gate"):
        grid_of(64, {"img_ids": beside})


def test_guidance_that_is_not_asked_for_is_the_pipelines_own() -> None:
    class Guided:
        def __call__(self, prompt: str, guidance_scale: float = 5.0, true_cfg_scale: float = 1.0) -> None: ...

    call, pipe = {"hidden_states": torch.zeros(1, 4, 2)}, Guided()

    def size(**asked: Any) -> Any:
        return size_of("transformer", call, asked, pipe)

    assert size() == size(guidance_scale=5.0) != size(guidance_scale=1.0)
    assert size(negative_prompt="a") == size(negative_prompt_embeds=torch.zeros(1)) != size()


def test_an_engines_seconds_hold_once_a_request_has_run() -> None:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"seconds": 1e3, "mag_ratios": CURVE}
    ) as omni:
        settings = []
        for seed in range(2):
            asked = Params(num_inference_steps=8, seed=seed, output_type="latent", **DEFAULTS)
            (output,) = omni.generate(embeds(seed), asked, use_tqdm=False)
            assert output.ok, output.error
            settings.append(output.cache_settings)
        assert settings[0]["preset"] == "auto" and settings[1]["seconds"] == 1e3


def test_an_engine_that_cannot_promise_decibels_says_so_at_its_start() -> None:
    with pytest.raises(InvalidValueError, match=r"psnr.*calibrate"):
        Omni.from_pipe(tiny_flux(), cache_backend="magcache", cache_config={"psnr": 40.0, "profile": "flux1-dev-28"})


def test_one_profile_with_figures_is_enough_for_an_engines_decibels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    known = shipped_profile("demo")
    newest = known.model_copy(update={"budgets": (), "name": "newest", "ratios": known.ratios, "models": ()})
    newest.save(tmp_path / "newest.json")
    with Omni("demo", dtype="float32", cache_backend="magcache", cache_config={"psnr": 40.0}) as omni:
        profiles = omni.engine.worker.profile_names
        assert {"newest", "demo"} <= set(profiles), profiles


def test_a_request_that_changes_something_else_has_the_engines_seconds() -> None:
    config = {"seconds": 1e3, "mag_ratios": CURVE}
    with Omni.from_pipe(tiny_flux(), cache_backend="magcache", cache_config=config) as omni:
        asked = Params(num_inference_steps=8, seed=0, output_type="latent", cache={"predictor": "reuse"}, **DEFAULTS)
        (output,) = omni.generate(embeds(0), asked, use_tqdm=False)
        assert output.ok, output.error
        alone = asked.model_copy(update={"height": 48, "cache": {"seconds": 5.0}})
        (output,) = omni.generate(embeds(0), alone, use_tqdm=False)
        assert isinstance(output.error, InvalidValueError) and "ran alone" in str(output.error)


def test_measurements_that_were_dropped_for_lack_of_room_do_not_count_as_fruitless() -> None:
    schedule = Schedule(4, (1.0, 0.8, 0.5, 0.2))
    for dropped in (True, False):
        calibration = Calibration()
        state = calibration.state(schedule)
        for step in range(4):
            state.commit(("transformer", "default"), step, Kept())
            state.observe(step, torch.ones(1, 4), None)
            if dropped and step == 1:
                state.drop()
        assert calibration.fruitless == (not dropped)


def test_decibels_of_a_preset_hold_for_what_was_measured_alone() -> None:
    profile = shipped_profile("demo")
    schedule = Schedule(28, profile.sigmas or ())
    usual = compose(parse("magcache", DiffusionCacheConfig(preset="high")), profile.ratios, profile, schedule)
    other = DiffusionCacheConfig(preset="high", predictor="reuse")
    assert compose(parse("magcache", other), profile.ratios, profile, schedule).full_forwards == round(28 / 1.5)
    assert usual.full_forwards != round(28 / 1.5)
