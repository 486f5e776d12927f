"""Features that meet: previews, gates without room, other weights, adapters and guidance while a profile is learnt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from adapters import save_adapter
from closeness import assert_close
from diffusers import DiffusionPipeline
from families import FAMILIES
from gating import asked
from pipelines import DEFAULTS, embeds, run_latents, tiny_flux
from stepping import add

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.engine.control import EngineControl
from vllm_omni.engine.describe import describe
from vllm_omni.engine.learning import IdleLearning
from vllm_omni.engine.wire import UpdateWeights
from vllm_omni.errors import InvalidValueError
from vllm_omni.learning import REQUESTS

pytestmark = pytest.mark.usefixtures("profiles")


def drawn(omni: Omni, outputs: dict[str, Any]) -> int:
    """Run to the end; returns the number of previews."""
    previews = 0
    while omni.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in omni.engine.step()}
        previews += sum(len(output.images) for output in omni.engine.progress(previews_only=True))
    return previews


def test_latents_that_a_pipeline_gives_by_place_or_as_a_list_end_nobody(caplog: pytest.LogCaptureFixture) -> None:
    family = next(f for f in FAMILIES if f.name == "Z-Image")
    with Omni.from_pipe(family.build(), defaults=family.settings) as omni:
        add(omni, "a", family.prompt(0), Params(num_inference_steps=6, seed=0, output_type="np", preview_every=2))
        add(omni, "b", family.prompt(1), Params(num_inference_steps=6, seed=1, output_type="latent"))
        outputs: dict[str, Any] = {}
        drawn(omni, outputs)  # the family has no VAE to draw with, and so "a" fails in the end
        assert "hidden_states" not in caplog.text
        assert outputs["b"].ok, outputs["b"].error
        alone = omni.generate(
            family.prompt(1), Params(num_inference_steps=6, seed=1, output_type="latent"), use_tqdm=False
        )
        assert_close(outputs["b"].latents, alone[0].latents)


def test_a_preview_that_fails_costs_the_preview_alone(caplog: pytest.LogCaptureFixture) -> None:
    pipe, left = tiny_flux(), [1]

    def fail(module: Any, args: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("not now")

    pipe.vae.decoder.register_forward_pre_hook(fail)
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni, caplog.at_level(logging.WARNING, "vllm_omni"):
        for name, every in (("a", 2), ("b", None)):
            add(omni, name, embeds(0), Params(num_inference_steps=6, seed=0, preview_every=every))
        outputs: dict[str, Any] = {}
        assert drawn(omni, outputs) == 1 and "no preview: not now" in caplog.text
    assert outputs["a"].ok and outputs["b"].ok


@pytest.fixture
def gated() -> Iterator[Omni]:
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        yield omni


@pytest.mark.parametrize("gate", ["fbcache", "teacache"])
def test_a_gate_that_has_no_room_to_look_lets_its_request_go_on_without_a_cache(gated: Omni, gate: str) -> None:
    params = Params(num_inference_steps=8, seed=0, output_type="latent")
    plain = gated.generate(embeds(0), params.model_copy(update={"cache": "off"}), use_tqdm=False)[0]
    calls = [0]

    def short(module: Any, args: Any, kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:  # the first is the first step's own
            raise torch.OutOfMemoryError("no room")

    handle = gated.engine.worker.pipeline.transformer.transformer_blocks[0].norm1.register_forward_pre_hook(
        short, with_kwargs=True
    )
    first = gated.generate(embeds(0), params.model_copy(update={"cache": asked(gate)}), use_tqdm=False)[0]
    handle.remove()
    assert first.ok, first.error
    assert_close(first.latents, plain.latents)
    again = gated.generate(embeds(0), params.model_copy(update={"cache": asked(gate)}), use_tqdm=False)[0]
    assert again.ok, again.error


def learning(folder: Path, **more: Any) -> Omni:
    engine = {"dtype": "float32", "cache_backend": "magcache", "cache_config": {"calibrate": "auto"}}
    return Omni(str(folder), **engine | more)


SHORT: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}


@pytest.mark.parametrize("complete", [False, True], ids=["while it learns", "with a whole profile"])
def test_updated_weights_are_not_served_by_the_profile_of_the_old_ones(
    folder: Path, profiles: Path, complete: bool
) -> None:
    other = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        other.transformer.x_embedder.weight.mul_(1.5)
    other.save_pretrained(folder.parent / "other")
    with learning(folder) as omni:
        for seed in range(REQUESTS):
            omni.generate("x", Params(seed=seed, **SHORT), use_tqdm=False)
        assert omni.generate("x", Params(seed=9, **SHORT), use_tqdm=False)[0].skipped_steps > 0
        assert omni.engine.worker.profile_names
        if complete:
            omni.engine.worker._backends["magcache"].learning = None  # type: ignore[attr-defined]
        EngineControl(omni.engine).do(UpdateWeights(str(folder.parent / "other"), ["transformer"]))
        assert omni.engine.worker.profile_names == []
        for seed in range(REQUESTS):
            assert omni.generate("x", Params(seed=seed, **SHORT), use_tqdm=False)[0].skipped_steps == 0
        assert omni.generate("x", Params(seed=9, **SHORT), use_tqdm=False)[0].skipped_steps > 0
    assert len(list(profiles.glob("*.json"))) == 2


def test_a_profile_is_learnt_of_the_model_as_it_is_and_not_of_an_adapter(folder: Path) -> None:
    ink = str(save_adapter(DiffusionPipeline.from_pretrained(folder), folder.parent / "ink", 0))
    with learning(folder, lora_modules={"ink": ink}) as omni:
        for seed in range(REQUESTS):
            output = omni.generate("x", Params(seed=seed, lora_request="ink", **SHORT), use_tqdm=False)[0]
            assert output.ok and output.skipped_steps == 0
        learner = omni.engine.worker.learner
        assert learner is not None and learner.learn() is None and omni.engine.worker.profile_names == []


def test_a_guided_request_among_others_does_not_keep_a_profile_from_being_learnt(folder: Path) -> None:
    with learning(folder) as omni:
        guided = Params(seed=0, true_cfg_scale=3.0, negative_prompt="x", **SHORT)
        assert omni.generate("x", guided, use_tqdm=False)[0].ok
        for seed in range(REQUESTS):
            omni.generate("x", Params(seed=seed, **SHORT), use_tqdm=False)
        assert omni.generate("x", Params(seed=9, **SHORT), use_tqdm=False)[0].skipped_steps > 0


def test_a_profile_is_not_learnt_of_noise_levels_of_a_requests_own(folder: Path) -> None:
    with learning(folder) as omni:
        for seed in range(REQUESTS):
            own = Params(seed=seed, sigmas=[0.4, 0.3, 0.2, 0.1], **SHORT)
            assert omni.generate("x", own, use_tqdm=False)[0].skipped_steps == 0
        learner = omni.engine.worker.learner
        assert learner is not None and learner.learn() is None and omni.engine.worker.profile_names == []


def test_a_backend_that_a_request_brings_leaves_nothing_of_its_settings_behind() -> None:
    curve = {"backend": "magcache", "mag_ratios": [1.0] * 8, "nfe": 4}
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        params = Params(num_inference_steps=8, seed=0, output_type="latent")
        first = omni.generate(embeds(0), params.model_copy(update={"cache": curve}), use_tqdm=False)[0]
        assert first.ok and first.skipped_steps == 4
        bare = {"backend": "magcache", "nfe": 4}
        second = omni.generate(embeds(0), params.model_copy(update={"cache": bare}), use_tqdm=False)[0]
        assert isinstance(second.error, InvalidValueError) and second.error.field.endswith("mag_ratios")


@pytest.mark.slow
def test_a_budget_of_the_engines_own_ends_no_trial(folder: Path) -> None:
    """Trials have plans of their own; one of two steps could not keep a budget of three forwards."""
    with learning(folder, cache_config={"calibrate": "auto", "nfe": 3}) as omni:
        for seed in range(REQUESTS):
            omni.generate("x", Params(seed=seed, **SHORT), use_tqdm=False)
        idle = IdleLearning(omni.engine, describe(omni.engine, {}))
        for _ in range(400):
            if not idle.wanted:
                break
            idle.begin()
            while omni.engine.has_unfinished_requests():
                for output in omni.engine.step():
                    assert idle.takes(output)
        learner = omni.engine.worker.learner
        assert learner is not None and learner.profiles[0].lacks == []


class Multistep(d.FluxPipeline):
    """Keeps the velocities of a run on itself, and mixes each with the one before."""

    def __call__(self, **kwargs: Any) -> Any:
        self.history.clear()
        own = self.scheduler.step

        def step(output: Any, *given: Any, **named: Any) -> Any:
            self.history.append(output)
            return own(sum(self.history[-2:]) / len(self.history[-2:]), *given, **named)

        self.scheduler.step = step
        try:
            return super().__call__(**kwargs)
        finally:
            del self.scheduler.step


def test_what_a_pipeline_notes_on_itself_is_its_requests_own() -> None:
    def build() -> Any:
        pipe = Multistep(**tiny_flux().components)
        pipe.history = []
        pipe.set_progress_bar_config(disable=True)
        return pipe

    plain = [run_latents(build(), i=i, seed=i, num_inference_steps=5 + i) for i in range(3)]
    with Omni.from_pipe(build(), defaults=DEFAULTS) as omni:
        params = [Params(num_inference_steps=5 + i, seed=i, output_type="latent") for i in range(3)]
        outputs = omni.generate([embeds(i) for i in range(3)], params, use_tqdm=False)
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok
        assert_close(output.latents, wanted)
