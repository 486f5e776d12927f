"""A plan may forecast the denoiser's whole output: then a skipped step does not call it, in batches as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_differs
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from families import FAMILIES, Family
from pipelines import DEFAULTS, embeds, run_latents, tiny_flux
from probing import CFG, cached

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache import forward
from vllm_omni.diffusion.cache.plan.compose import CachePlan, choose_forecast
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile, MeasuredBudget
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, parse
from vllm_omni.diffusion.cache.state import PlannedState
from vllm_omni.diffusion.cache.store import CacheStore
from vllm_omni.errors import InvalidValueError
from vllm_omni.trials import Away, gains

MASK = (1, 1, 0, 1, 0, 1)
LEVELS = tuple(1 - i / 12 for i in range(12))
FORMS = ("FLUX.1", "Z-Image", "Stable Diffusion 3", "Wan 2.2 (two experts)", "LTX-Video", "Qwen-Image-Edit")


def profile_of(pipeline: Any, **more: Any) -> CacheProfile:
    """Outputs that are like each other if their noise levels are."""
    apart = np.subtract.outer(LEVELS, LEVELS)
    gram = tuple(map(tuple, np.exp(-(apart**2)).tolist()))
    return CacheProfile(
        name="tiny",
        transformer_class=type(pipeline.transformer).__name__,
        ratios=(1.0,) * len(LEVELS),
        sigmas=LEVELS,
        **{"gram": gram, "output_gram": gram} | more,
    )


def config_of(pipeline: Any, folder: Path, **more: Any) -> dict[str, Any]:
    profile_of(pipeline).save(folder / "tiny.json")
    return {"profile": str(folder / "tiny.json"), "steps_mask": MASK} | more


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


class Calls:
    """How often the denoisers of a pipeline run."""

    def __init__(self, pipeline: Any) -> None:
        self.count = 0
        for name in ("transformer", "transformer_2"):
            if (module := getattr(pipeline, name, None)) is not None:
                module.register_forward_hook(self._note)

    def _note(self, *arguments: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("name", FORMS)
def test_a_skipped_step_does_not_call_the_denoiser_and_a_mixed_batch_equals_each_request_alone(
    name: str, tmp_path: Path
) -> None:
    family = named(name)
    pipeline = family.build()
    params = [
        Params(**{"num_inference_steps": steps, "seed": i, "output_type": "latent", **family.guided(2.0 + i)})
        for i, steps in enumerate((4, 6, 9))
    ]
    prompts = [family.prompt(i) for i in range(len(params))]
    config = config_of(pipeline, tmp_path)
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=config, defaults=family.settings) as omni:
        omni.generate(prompts[0], params[0], use_tqdm=False)  # whatever a first call makes
        calls, alone = Calls(pipeline), []
        runner = omni.engine.worker.runner
        for prompt, asked in zip(prompts, params, strict=True):
            before, (computed, skipped) = calls.count, runner.forwards.values()
            (output,) = omni.generate(prompt, asked, use_tqdm=False)
            assert output.error is None and output.skipped_steps > 0
            assert calls.count - before == runner.forwards["computed"] - computed
            assert runner.forwards["skipped"] > skipped
            alone.append(output)
        for one, mixed in zip(alone, omni.generate(prompts, params, use_tqdm=False), strict=True):
            assert mixed.error is None and mixed.plan == one.plan
            assert (mixed.computed_steps, mixed.skipped_steps) == (one.computed_steps, one.skipped_steps)
            assert mixed.cache_settings["forecasts"] == "output"
            assert_close(mixed.latents, one.latents, roundings=family.roundings)
        assert omni.engine.worker.cache_bytes == 0


@pytest.mark.parametrize("guided", [{}, CFG], ids=["one branch", "two branches"])
def test_a_plain_pipeline_makes_what_the_engine_makes(guided: dict[str, Any], tmp_path: Path) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=6, **guided)
    config = config_of(pipeline, tmp_path)
    with cached(pipeline, **config) as backend:
        alone = run_latents(pipeline, num_inference_steps=6, **guided)
        assert backend.last_request is not None and backend.last_request.skipped_steps == 2
        assert backend.store.used == 0
        # Two outputs of the run, not two residuals: 16 tokens of 16 numbers for each branch.
        assert backend.store.peak <= 3 * (1 + bool(guided)) * alone.nbytes
    assert_differs(alone, plain)
    assert torch.equal(run_latents(pipeline, num_inference_steps=6, **guided), plain)
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=config, defaults=DEFAULTS) as omni:
        asked = Params(
            num_inference_steps=6, seed=0, output_type="latent", **({"true_cfg_scale": 3.0} if guided else {})
        )
        (output,) = omni.generate({**embeds(0), **{k: v for k, v in guided.items() if "embeds" in k}}, asked)
    assert_close(output.latents, alone)


def test_the_forecast_is_the_weighted_sum_of_earlier_outputs(tmp_path: Path) -> None:
    """What the scheduler gets at the first skipped step, against the outputs of the steps before."""
    pipeline = tiny_flux()
    seen: list[torch.Tensor] = []
    with cached(pipeline, **config_of(pipeline, tmp_path)) as backend:
        own = type(pipeline.scheduler).step

        def step(scheduler: Any, model_output: torch.Tensor, *arguments: Any, **given: Any) -> Any:
            seen.append(model_output.clone())
            return own(scheduler, model_output, *arguments, **given)

        pipeline.scheduler.step = step.__get__(pipeline.scheduler)
        run_latents(pipeline, num_inference_steps=6)
        plan = backend.last_request.plan if backend.last_request is not None else None
    assert plan is not None and plan.forecasts == "output"
    wanted = sum(weight * seen[anchor] for anchor, weight in plan.terms[2])
    assert [anchor for anchor, _ in plan.terms[2]] == [0, 1]
    assert_close(seen[2], wanted)


def test_requests_that_forecast_outputs_and_residuals_share_a_batch(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    params = [
        Params(num_inference_steps=6, seed=i, output_type="latent", cache=cache)
        for i, cache in enumerate(({}, {"predictor": "linear"}, {}, "off"))
    ]
    prompts = [embeds(i) for i in range(len(params))]
    config = config_of(pipeline, tmp_path)
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=config, defaults=DEFAULTS) as omni:
        alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
        kinds = [(output.cache_settings or {}).get("forecasts") for output in alone]
        assert kinds == ["output", "residual", "output", None]
        for one, mixed in zip(alone, omni.generate(prompts, params, use_tqdm=False), strict=True):
            assert (mixed.computed_steps, mixed.skipped_steps) == (one.computed_steps, one.skipped_steps)
            assert_close(mixed.latents, one.latents)


def test_a_forecast_that_fails_once_changes_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_flux()
    params = [Params(num_inference_steps=6, seed=i, output_type="latent") for i in range(3)]
    prompts = [embeds(i) for i in range(3)]
    own, failed = forward.blended, []

    def fails(forecast: Any) -> Any:
        if len(failed) < 2:
            failed.append(forecast)
            raise RuntimeError("out of memory")
        return own(forecast)

    config = config_of(pipeline, tmp_path)
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=config, defaults=DEFAULTS) as omni:
        alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
        monkeypatch.setattr(forward, "blended", fails)
        together = omni.generate(prompts, params, use_tqdm=False)
        assert len(failed) == 2 and [output.error is None for output in together].count(False) <= 1
        for one, mixed in zip(alone, together, strict=True):
            if mixed.error is None:
                assert (mixed.computed_steps, mixed.skipped_steps) == (one.computed_steps, one.skipped_steps)
                assert_close(mixed.latents, one.latents)
        assert omni.engine.worker.cache_bytes == 0


def test_calibration_measures_what_the_scheduler_gets() -> None:
    """With two branches that is what guidance has made of both. Few numbers are kept as they are, so it is exact."""
    pipeline = tiny_flux()
    seen: list[np.ndarray] = []
    own = pipeline.scheduler.step

    def step(model_output: torch.Tensor, *arguments: Any, **given: Any) -> Any:
        seen.append(model_output.double().flatten().numpy().copy())
        return own(model_output, *arguments, **given)

    pipeline.scheduler.step = step
    with cached(pipeline, mag_calibrate=True) as backend:
        run_latents(pipeline, num_inference_steps=6, **CFG)
        assert backend.calibration is not None
        profile = backend.calibration.profile("tiny", "FluxTransformer2DModel", "f")
    outputs = np.stack(seen)
    assert len(profile.branches) == 2
    assert np.allclose(profile.output_gram, outputs @ outputs.T / outputs.shape[1], rtol=1e-5)


def test_outputs_are_forecast_wherever_their_matrix_is_known() -> None:
    pipeline = tiny_flux()
    auto, own = (parse("magcache", DiffusionCacheConfig(nfe=6, predictor=name)) for name in ("auto", "linear"))
    both = profile_of(pipeline)
    assert choose_forecast(auto, both, 12, 6) == ("coherent", "output")
    assert choose_forecast(auto, both.model_copy(update={"output_gram": None}), 12, 6) == ("coherent", "residual")
    assert choose_forecast(auto, both.curve_alone(), 12, 6) == ("reuse", "residual")
    assert choose_forecast(own, both, 12, 6) == ("linear", "residual")
    assert choose_forecast(auto, both, 101, 6) == ("affine", "output")
    nearer = both.model_copy(update={"budgets": (MeasuredBudget(speedup=2.0, by_rule=True),)})
    assert choose_forecast(auto, nearer, 12, 6) == ("rule", "residual")
    assert choose_forecast(auto, nearer, 12) == ("coherent", "output")  # no budget


def test_trials_measure_the_gains_of_both() -> None:
    profile = profile_of(tiny_flux())
    measurement = gains(profile, 1)
    again, *others = measurement.trials
    kinds = [_made(trial, profile).forecasts for trial in others]
    assert again.uncached and not any(trial.uncached for trial in others)
    assert kinds.count("output") == kinds.count("residual") > 3
    found = measurement.read([Away(0, 1.0), *(Away(0.01 if kind == "residual" else 0.04, 1.0) for kind in kinds)])
    assert found.gains is not None and found.output_gains is not None  # of the same matrices
    assert np.allclose(found.output_gains, 2 * np.array(found.gains), rtol=1e-4)
    assert CacheProfile.from_dict(found.model_dump()) == found


def _made(trial: Any, profile: CacheProfile) -> Any:
    return trial.plan(Schedule(len(LEVELS), LEVELS))


class Pair(NamedTuple):
    sample: torch.Tensor
    more: torch.Tensor


@pytest.mark.parametrize(
    ("result", "whole"),
    [
        (torch.ones(3, 4), True),
        ((torch.ones(3, 4), torch.ones(3, 2)), True),
        ([torch.ones(4)] * 3, True),
        (Transformer2DModelOutput(sample=torch.ones(3, 4)), True),
        ((torch.ones(3, 4), {0: torch.ones(3, 4)}), False),  # a memory of the model's own
        ((torch.ones(3, 4), {"keys": torch.ones(3, 4)}), False),
        (Pair(torch.ones(3, 4), torch.ones(3, 4)), False),
        ((torch.ones(3, 4), torch.ones(2, 4)), False),
        ((torch.ones(3, 4), object()), False),
    ],
)
def test_what_is_more_than_rows_is_not_kept(result: Any, whole: bool) -> None:
    """Nor is what a forward gave that nothing may be taken from."""
    plan = CachePlan.of((True, False), {1: ((0, 1.0),)}, "output")
    arguments = {"hidden_states": torch.ones(3, 4)}
    for given, kept in ((object(), whole), (None, False)):
        state = PlannedState(plan, CacheStore(), {})
        row = forward.BatchRows(state, ("transformer", "default"), 0, slice(0, 3), arguments)
        stack: Any = given  # no step of this plan needs its blocks
        forward.CachedForward(stack, [row], [None]).commit(result)
        assert (state.forecast(row.key, 1, 3) is not None) is kept
        assert state.computed_steps == 1
        state.drop()


def test_a_matrix_of_outputs_is_checked_as_any_other() -> None:
    with pytest.raises(InvalidValueError, match="output_gram"):
        profile_of(tiny_flux(), output_gram=((1.0, 2.0), (2.0, 1.0)))
    with pytest.raises(InvalidValueError, match="output_gains"):
        profile_of(tiny_flux(), output_gains=(1.0,))
