"""Two denoisers in one pipeline (Wan 2.2): each has its own steps of the plan, and no residual crosses the switch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from families import FAMILIES
from pipelines import Blocks
from planning import planned

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.planner import coherence, coherent_cost, step_weights
from vllm_omni.diffusion.cache.profile import CacheProfile, shipped_profile
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.step_tracker import schedule_of
from vllm_omni.errors import InvalidValueError

WAN22 = next(family for family in FAMILIES if family.name.startswith("Wan 2.2 (two"))
CURVE = shipped_profile("wan22-t2v-a14b-40").ratios
BOUNDARIES = (0.5, 0.875, 0.9)
PLANS: dict[str, dict[str, Any]] = {
    "rule": {"mag_ratios": CURVE, "mag_threshold": 0.12, "mag_max_skip_steps": 2, "mag_retention_ratio": 0.1},
    "mask": {"steps_mask": [1, 0, 0, 1, 0, 0, 0, 0, 0, 1]},
    "nfe": {"mag_ratios": CURVE, "nfe": 5},
    "speedup": {"mag_ratios": CURVE, "speedup": 2.0},
    "linear": {"mag_ratios": CURVE, "nfe": 6, "predictor": "linear"},
    "open end": {"mag_ratios": CURVE, "nfe": 2, "compute_last_step": False},
}


def wan22(boundary: float) -> Any:
    pipeline = WAN22.build()
    pipeline.register_to_config(boundary_ratio=boundary)
    return pipeline


def run(pipeline: Any, steps: int = 12) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(7)
    arguments = {**WAN22.settings, **WAN22.prompt(0), "num_inference_steps": steps, "guidance_scale": 3.0}
    return pipeline(**arguments, generator=generator, output_type="latent").frames


def first_steps(pipeline: Any) -> int:
    """How many of the schedule's steps the first expert has, by the timesteps it is for."""
    boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
    return sum(t >= boundary for t in pipeline.scheduler.timesteps.tolist())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_each_expert_computes_the_steps_of_its_plan(boundary: float, plan: str) -> None:
    pipeline = wan22(boundary)
    backend = MagCacheBackend(DiffusionCacheConfig(**PLANS[plan]))
    backend.enable(pipeline)
    blocks = Blocks(pipeline)
    run(pipeline)
    record, first = backend.last_request, first_steps(pipeline)
    assert record is not None and record.plan is not None
    compute = record.plan.compute
    assert 0 < first < 12 and compute[0] and compute[first]
    assert blocks.counts == [2 * sum(compute[:first]), 2 * sum(compute[first:])]  # two guidance branches
    assert record.computed_steps == record.settings["planned_forwards"] == sum(compute) < 12
    assert record.settings["switches"] == (first,)
    promised = {"nfe": 5, "speedup": 6, "linear": 6, "open end": 2}
    assert sum(compute) == promised.get(plan, sum(compute))
    assert backend.store.used == 0


def test_a_run_that_ends_before_the_switch_is_one_segment() -> None:
    pipeline = wan22(0.0)
    settings = {"mag_ratios": CURVE, "nfe": 2}
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=settings, defaults=WAN22.settings) as omni:
        blocks = Blocks(pipeline, rows=True)
        params = Params(num_inference_steps=8, seed=1, output_type="latent", guidance_scale=3.0)
        output = omni.generate(WAN22.prompt(0), params, use_tqdm=False)[0]
        assert output.error is None and output.computed_steps == 2
        assert blocks.counts == [4, 0] and "switches" not in output.cache_settings

        blocks.reset()  # and one whose first expert has a single step
        late = params.model_copy(update={"boundary_ratio": 1.0, "num_inference_steps": 6, "cache": {"nfe": 3}})
        output = omni.generate(WAN22.prompt(0), late, use_tqdm=False)[0]
        assert output.error is None and blocks.counts == [2, 4]
        assert output.cache_settings["switches"] == (1,) and output.plan[1]


def test_requests_with_different_boundaries_share_an_engine() -> None:
    pipeline = wan22(0.5)
    settings = {"mag_ratios": CURVE, "speedup": 2.0}
    params = [
        Params(num_inference_steps=steps, seed=i, output_type="latent", guidance_scale=2.0 + i, boundary_ratio=boundary)
        for i, (steps, boundary) in enumerate([(12, 0.9), (20, 0.875), (12, None), (8, 0.0)])
    ]
    prompts = [WAN22.prompt(i) for i in range(4)]
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=settings, defaults=WAN22.settings) as omni:
        blocks = Blocks(pipeline, rows=True)
        alone, counts = [], []
        for prompt, param in zip(prompts, params, strict=True):
            blocks.reset()
            alone.append(omni.generate(prompt, param, use_tqdm=False)[0])
            counts.append(blocks.counts)
        blocks.reset()
        together = omni.generate(prompts, params, use_tqdm=False)
        assert blocks.counts == np.sum(counts, axis=0).tolist()
    for one, mixed, param, count in zip(alone, together, params, counts, strict=True):
        assert one.error is None and mixed.error is None, (one.error, mixed.error)
        assert mixed.plan == one.plan and sum(one.plan) * 2 == param.num_inference_steps
        assert mixed.cache_settings.get("switches") == one.cache_settings.get("switches")
        first = one.cache_settings.get("switches", (len(one.plan),))[0]
        assert count == [2 * sum(one.plan[:first]), 2 * sum(one.plan[first:])]
        assert_close(mixed.latents, one.latents)
    assert len({one.cache_settings.get("switches") for one in alone}) == 4
    assert pipeline.config.boundary_ratio == 0.5


def test_a_boundary_without_a_second_expert_is_refused() -> None:
    plain = next(family for family in FAMILIES if family.name == "Wan 2.1")
    with Omni.from_pipe(plain.build(), defaults=plain.settings) as omni:
        output = omni.generate(plain.prompt(0), Params(num_inference_steps=2, boundary_ratio=0.5), use_tqdm=False)[0]
        assert output.error is not None and "boundary_ratio" in str(output.error)


def test_a_budget_that_two_experts_cannot_keep_names_the_nearest() -> None:
    config = DiffusionCacheConfig(mag_ratios=CURVE, nfe=1, compute_last_step=False)
    sigmas = tuple(np.linspace(1, 0.1, 10))
    assert planned(config, CURVE, None, 10, sigmas).full_forwards == 1
    with pytest.raises(InvalidValueError, match=r"10 steps of 2 denoisers \(nearest: 2\)"):
        planned(config, CURVE, None, 10, sigmas, (4,))
    with pytest.raises(InvalidValueError, match=r"nearest: 5, 2 full forwards"):
        planned(config.model_copy(update={"nfe": None, "speedup": 10.0}), CURVE, None, 10, sigmas, (4,))
    pipeline = wan22(0.5)
    with Omni.from_pipe(
        pipeline, cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults=WAN22.settings
    ) as omni:
        cache = {"nfe": 1, "compute_last_step": False}
        params = [Params(num_inference_steps=6, seed=0, output_type="latent", cache=c) for c in (cache, {"nfe": 3})]
        refused, kept = omni.generate([WAN22.prompt(0)] * 2, params, use_tqdm=False)
        assert "nearest: 2" in str(refused.error) and kept.ok and kept.computed_steps == 3
        assert omni.engine.worker.cache_bytes == 0


def with_gram(steps: int) -> CacheProfile:
    """A profile whose residuals turn slowly within each half, and are another thing after it."""
    angle = np.linspace(0, 2, steps)
    gram = np.cos(angle[:, None] - angle[None, :]) + 1e-3 * np.eye(steps)
    half = np.arange(steps) < steps // 2
    gram *= half[:, None] == half[None, :]
    return CacheProfile(
        name="two", transformer_class="WanTransformer3DModel", ratios=(1.0,) * steps, gram=gram.tolist(),
        sigmas=np.linspace(1, 0.1, steps).tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("predictor", ["reuse", "linear", "affine", "auto"])
def test_no_forecast_crosses_the_switch_and_no_plan_is_better(predictor: str) -> None:
    from itertools import combinations

    steps, nfe = 9, 5
    profile = with_gram(steps)
    assert profile.sigmas is not None
    gram, weights = np.asarray(profile.gram), step_weights(profile.sigmas)
    for switches in [(4,), (3, 6), (8,), ()]:
        config = DiffusionCacheConfig(nfe=nfe, predictor=predictor)
        plan = planned(config, profile.ratios, profile, steps, profile.sigmas, switches)
        ends = (0, *switches, steps)
        for step, terms in plan.terms.items():
            begin = max(s for s in ends if s <= step)
            assert terms and all(begin <= anchor < step for anchor, _ in terms)
        assert plan.full_forwards == nfe

        def cost(computed: tuple[bool, ...], switches: tuple[int, ...] = switches) -> float:
            return coherent_cost(computed, gram, coherence(weights), switches)

        every = [{0, steps - 1, *switches} | set(some) for some in combinations(range(steps), nfe)]
        others = [tuple(step in one for step in range(steps)) for one in every if len(one) == nfe]
        assert cost(plan.compute) == pytest.approx(min(map(cost, others)), rel=1e-3)


def test_a_late_start_moves_the_switch() -> None:
    """An image-to-video run that starts half-way has fewer steps before the switch, or none."""
    pipeline = wan22(0.5)
    pipeline.scheduler.set_timesteps(10)
    whole = schedule_of(pipeline)
    assert whole.switches == (first_steps(pipeline),) and whole.steps == len(whole.sigmas) == 10
    for left in range(1, 10):
        vars(pipeline)["_num_timesteps"] = left
        expected = whole.switches[0] - (10 - left)
        assert schedule_of(pipeline).switches == ((expected,) if expected > 0 else ())
