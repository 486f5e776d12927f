"""The cache on a plain diffusers pipeline, without the engine: steps, branches, memory, and what disable restores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from pipelines import CURVE, count_blocks, embeds, flux2_inputs, run_latents, tiny_flux, tiny_flux2
from probing import CFG, RESIDUAL_BYTES, Probe, cached, probed, sigmas_of

from vllm_omni.diffusion.cache.magcache import (
    FluxMagCacheStrategy,
    MagCacheBackend,
    MagCacheConfig,
    apply_mag_cache_hook,
)
from vllm_omni.diffusion.data import DiffusionCacheConfig


def test_the_documented_example_runs_as_written(plain: dict[int, torch.Tensor]) -> None:
    pipeline = tiny_flux()
    blocks = count_blocks(pipeline)
    backend = MagCacheBackend(
        DiffusionCacheConfig(
            mag_ratios=FluxMagCacheStrategy.FLUX_MAG_RATIOS,
            num_inference_steps=28,
            mag_threshold=0.24,
            mag_max_skip_steps=5,
            mag_retention_ratio=0.1,
        )
    )
    backend.enable(pipeline)
    backend.refresh(pipeline, num_inference_steps=50)
    latents = run_latents(pipeline, num_inference_steps=50)
    plan = backend.plan(50, sigmas_of(pipeline))
    assert blocks.count == plan.full_forwards < 30
    assert backend.last_request is not None
    assert backend.last_request.computed_steps == blocks.count
    assert backend.last_request.skipped_steps == 50 - blocks.count
    assert torch.isfinite(latents).all() and not torch.equal(latents, plain[50])
    assert (latents - plain[50]).norm() < 0.3 * plain[50].norm()


@pytest.mark.parametrize("order", [(4, 10, 28, 50, None), (None, 50, 4, 28, 10), (28, None, 10, 50, 4)])
def test_step_counts_in_any_order_follow_their_own_plans(pipe: FluxPipeline, order: tuple[int | None, ...]) -> None:
    blocks = count_blocks(pipe)
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=1)  # a warm-up shifts nobody's schedule
        for steps in order:
            blocks.reset()
            run_latents(pipe, **({} if steps is None else {"num_inference_steps": steps}))
            plan = backend.plan(steps or 28, sigmas_of(pipe))
            assert blocks.count == plan.full_forwards, steps
            assert len(plan.compute) == (steps or 28) and backend.store.used == 0
    blocks.remove()


def test_blocks_run_at_exactly_the_computed_steps(pipe: FluxPipeline) -> None:
    with cached(pipe) as backend, probed(pipe) as probe:
        run_latents(pipe, num_inference_steps=28)
        assert tuple(probe.ran) == backend.plan(28, sigmas_of(pipe)).compute


def test_a_warm_up_run_does_not_change_later_runs(pipe: FluxPipeline) -> None:
    with cached(pipe) as backend:
        first = run_latents(pipe, num_inference_steps=10)
        backend.refresh(pipe, 1)
        run_latents(pipe, num_inference_steps=1, i=3)
        run_latents(pipe, num_inference_steps=28, i=2, seed=9)
        assert torch.equal(run_latents(pipe, num_inference_steps=10), first)
        backend.refresh(pipe, 99)  # what is announced does not matter, the schedule does
        assert torch.equal(run_latents(pipe, num_inference_steps=10), first)


def test_latents_are_bit_identical_if_no_step_is_skipped(pipe: FluxPipeline, plain: dict[int, torch.Tensor]) -> None:
    """The published curve holds exact ones, whose error is 0 at any threshold; so a curve without."""
    with cached(pipe, mag_threshold=1e-9, mag_ratios=[1.0] + [1.001] * 27) as backend:
        for steps in (4, 28):
            assert torch.equal(run_latents(pipe, num_inference_steps=steps), plain[steps])
        assert backend.last_request is not None and backend.last_request.skipped_steps == 0


def test_disable_restores_the_pipeline(plain: dict[int, torch.Tensor]) -> None:
    pipeline = tiny_flux()
    modules = [pipeline.transformer, *pipeline.transformer.transformer_blocks]

    def facts() -> list[Any]:
        found: list[Any] = [sorted(vars(pipeline.scheduler).keys() - {"_begin_index", "_step_index"})]
        for module in modules:
            found += [sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)]
            found += [list(map(id, module._modules.values()))]
        return found

    run_latents(pipeline, num_inference_steps=4)
    before = facts()
    for predictor in ("reuse", "linear"):
        with cached(pipeline, predictor=predictor):
            run_latents(pipeline, num_inference_steps=10)
        assert facts() == before
    for steps, latents in plain.items():
        assert torch.equal(run_latents(pipeline, num_inference_steps=steps), latents)
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE))
    backend.disable(pipeline)  # before enable: nothing to do
    backend.enable(pipeline)
    backend.enable(pipeline)  # twice is once
    assert backend.is_enabled() and "magcache" not in repr(pipeline.scheduler)
    backend.disable(pipeline)
    backend.disable(pipeline)
    assert facts() == before and not backend.is_enabled()


def test_two_branches_share_decisions_but_not_residuals(pipe: FluxPipeline) -> None:
    with cached(pipe, predictor="reuse") as backend, probed(pipe) as probe:
        run_latents(pipe, num_inference_steps=28, **CFG)
        plan = backend.plan(28, sigmas_of(pipe)).compute
        peak, used = backend.store.peak, backend.store.used
    assert len(probe.ran) == 56
    for branch in (0, 1):
        assert tuple(probe.ran[branch::2]) == plan
        added, before, last = probe.added[branch::2], probe.before[branch::2], None
        for step, computed in enumerate(plan):
            if computed:
                last = added[step]
            else:
                assert_close(added[step], last, scale=before[step])
    apart = [(a - b).norm() / a.norm() for a, b in zip(probe.added[::2], probe.added[1::2], strict=True)]
    assert min(apart) > 0.01  # so a shared residual would have been seen
    assert (peak, used) == (2 * RESIDUAL_BYTES, 0)


def test_a_branch_that_starts_late_or_stops_early_keeps_its_own_residuals() -> None:
    """CFG that is on for some steps only: a branch without the residual its plan counts on computes."""
    config = MagCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10, max_skip_steps=2, retention_ratio=0.3)
    transformer = tiny_flux2()
    apply_mag_cache_hook(transformer, config)
    probe = Probe(transformer)
    ran: dict[str, list[bool]] = {"cond": [], "uncond": []}
    with torch.no_grad():
        for step in range(10):
            for name in ("cond", "uncond") if 4 <= step < 8 else ("cond",):
                with transformer.cache_context(name):
                    transformer(**flux2_inputs(step, seed=len(name)))
                ran[name].append(probe.ran[-1])
    assert ran["cond"] == [True, True, True, False, False, True, False, False, True, True]
    assert ran["uncond"] == [True, True, False, False]


def test_several_images_per_prompt_run_as_one_request(pipe: FluxPipeline) -> None:
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=10, num_images_per_prompt=3)
        assert backend.store.peak == 3 * RESIDUAL_BYTES and backend.store.used == 0


def test_the_scheduler_may_be_replaced_between_runs(pipe: FluxPipeline) -> None:
    old = pipe.scheduler
    new = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0, shift_terminal=0.1)
    blocks = count_blocks(pipe)
    try:
        with cached(pipe) as backend:
            run_latents(pipe, num_inference_steps=10)
            for scheduler, steps in ((new, 28), (old, 10), (new, 4)):
                pipe.scheduler = scheduler
                blocks.reset()
                run_latents(pipe, num_inference_steps=steps)
                assert blocks.count == backend.plan(steps, sigmas_of(pipe)).full_forwards
    finally:
        pipe.scheduler = old
        blocks.remove()
    for scheduler in (old, new):
        assert not {"step", "set_timesteps"} & vars(scheduler).keys()


@pytest.mark.parametrize("predictor", ["reuse", "linear"])
def test_an_exception_inside_a_block_leaves_the_pipeline_usable(predictor: str) -> None:
    pipeline = tiny_flux()
    transformer = pipeline.transformer
    own = {name: id(module) for name, module in transformer._modules.items()}
    with cached(pipeline, predictor=predictor) as backend:
        good = run_latents(pipeline, num_inference_steps=28)
        plan = backend.plan(28, sigmas_of(pipeline)).compute
        at_step, calls = max(s for s in range(28) if plan[s - 1 : s + 1] == (False, True)), [0]  # a residual is held

        def fail(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == sum(plan[: at_step + 1]):
                raise RuntimeError("injected")

        handle = transformer.single_transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="injected"):
            run_latents(pipeline, num_inference_steps=28)
        handle.remove()
        assert {name: id(module) for name, module in transformer._modules.items()} == own
        assert torch.equal(run_latents(pipeline, num_inference_steps=28), good)
        assert backend.store.used == 0


def test_an_exception_frees_the_residuals(pipe: FluxPipeline) -> None:
    calls = [0]

    def fail(module: Any, args: Any) -> None:
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("injected")

    with cached(pipe, mag_ratios=[1.0] * 10, mag_max_skip_steps=1, predictor="linear") as backend:
        handle = pipe.transformer.norm_out.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="injected"):
            run_latents(pipe, num_inference_steps=10)
        handle.remove()
        assert backend.store.used == 0


def test_a_skipped_step_adds_a_residual(pipe: FluxPipeline) -> None:
    with cached(pipe), probed(pipe) as probe:
        run_latents(pipe, num_inference_steps=28)
    skipped = [a.norm() / b.norm() for a, b, ran in zip(probe.added, probe.before, probe.ran, strict=True) if not ran]
    assert len(skipped) > 5 and min(skipped) > 0.01


def test_linear_forecasts_are_the_line_through_the_last_two_residuals(pipe: FluxPipeline) -> None:
    with cached(pipe, predictor="linear"), probed(pipe) as probe:
        run_latents(pipe, num_inference_steps=28)
        sigmas = sigmas_of(pipe)
    checked = 0
    for step, ran in enumerate(probe.ran):
        if ran:
            continue
        a, b = [s for s in range(step) if probe.ran[s]][-2:]
        slope = (sigmas[step] - sigmas[b]) / (sigmas[b] - sigmas[a])
        line = probe.added[b] + slope * (probe.added[b] - probe.added[a])
        assert_close(probe.added[step], line, scale=probe.before[step])
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", ["controlnet_block_samples", "controlnet_single_block_samples"])
def test_steps_with_controlnet_samples_are_computed(
    pipe: FluxPipeline, plain: dict[int, torch.Tensor], name: str
) -> None:
    blocks = count_blocks(pipe)
    zeros = [torch.zeros(1, 64, 32)]
    with cached(pipe) as backend:
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, name: zeros}), with_kwargs=True, prepend=True
        )
        latents = run_latents(pipe, num_inference_steps=28)
        handle.remove()
        assert blocks.count == 28 and backend.store.peak == 0
        assert torch.equal(latents, plain[28])
        blocks.reset()
        run_latents(pipe, num_inference_steps=28)
        assert blocks.count < 28
    blocks.remove()


def test_only_steps_with_controlnet_samples_are_forced(pipe: FluxPipeline) -> None:
    """A ControlNet that acts on a part of the run: a step that the plan would skip is computed, and not kept."""
    steps = iter(range(10))
    zeros = [torch.zeros(1, 64, 32)]

    def controlled(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "controlnet_block_samples": zeros if next(steps) in (2, 4) else None}

    with cached(pipe, mag_ratios=[1.0] * 10, mag_max_skip_steps=3, predictor="reuse") as backend, probed(pipe) as probe:
        handle = pipe.transformer.register_forward_pre_hook(controlled, with_kwargs=True, prepend=True)
        run_latents(pipe, num_inference_steps=10)
        handle.remove()
        plan = backend.plan(10, sigmas_of(pipe)).compute
        assert plan == (True, False, False, False, True, False, False, False, True, True)
        # 2 is forced, 3 still builds on 0; 4 was to be the anchor of 5 to 7 but is not clean, so they compute too
        assert probe.ran == [True, False, True, False, True, True, True, True, True, True]
        assert backend.store.used == 0


@pytest.mark.parametrize(("predictor", "residuals"), [("reuse", 1), ("linear", 2)])
@pytest.mark.parametrize("branches", [1, 2])
def test_peak_memory_is_the_predictors_residuals_per_branch(
    pipe: FluxPipeline, predictor: str, residuals: int, branches: int
) -> None:
    with cached(pipe, predictor=predictor) as backend:
        run_latents(pipe, num_inference_steps=28, **(CFG if branches == 2 else {}))
        assert backend.store.peak == residuals * branches * RESIDUAL_BYTES
        assert backend.store.used == 0


def test_no_memory_is_held_if_no_step_is_skipped(pipe: FluxPipeline) -> None:
    with cached(pipe, mag_threshold=1e-9, mag_ratios=[1.0] + [1.001] * 27) as backend:
        run_latents(pipe, num_inference_steps=10)
        assert backend.store.peak == 0


@pytest.mark.parametrize(("predictor", "branches"), [("reuse", 2), ("linear", 1), ("linear", 2)])
def test_a_memory_budget_of_one_residual_computes_more_steps(pipe: FluxPipeline, predictor: str, branches: int) -> None:
    extra = CFG if branches == 2 else {}
    blocks = count_blocks(pipe)
    exact = run_latents(pipe, num_inference_steps=28, **extra)
    with cached(pipe, predictor=predictor) as backend:
        blocks.reset()
        free = run_latents(pipe, num_inference_steps=28, **extra)
        unlimited = blocks.count
    with cached(pipe, predictor=predictor, memory_budget_mb=RESIDUAL_BYTES / 2**20) as backend:
        blocks.reset()
        latents = run_latents(pipe, num_inference_steps=28, **extra)
        assert unlimited < blocks.count <= 28 * branches
        assert backend.store.peak <= RESIDUAL_BYTES and backend.store.used == 0
    assert torch.isfinite(latents).all()
    assert (latents - exact).norm() <= 1.5 * (free - exact).norm()
    blocks.remove()


@pytest.mark.parametrize("budget", [0, (RESIDUAL_BYTES - 1) / 2**20])
def test_without_memory_for_a_residual_the_latents_are_the_plain_ones(
    pipe: FluxPipeline, plain: dict[int, torch.Tensor], budget: float
) -> None:
    with cached(pipe, memory_budget_mb=budget) as backend:
        assert torch.equal(run_latents(pipe, num_inference_steps=28), plain[28])
        assert backend.store.peak == 0 and backend.last_request is not None
        assert backend.last_request.computed_steps == 28


@pytest.mark.slow
def test_compiled_blocks_keep_working_with_the_cache_on(pipe: FluxPipeline) -> None:
    with cached(pipe):
        eager = run_latents(pipe, num_inference_steps=8)
    pipeline = tiny_flux()
    pipeline.transformer.compile_repeated_blocks(backend="eager")
    blocks = count_blocks(pipeline)
    with cached(pipeline) as backend:
        compiled = run_latents(pipeline, num_inference_steps=8)
        assert blocks.count == backend.plan(8, sigmas_of(pipeline)).full_forwards < 8
        assert torch.equal(run_latents(pipeline, num_inference_steps=8), compiled)
    assert_close(compiled, eager)


def test_a_cached_run_decodes_to_an_image(pipe: FluxPipeline) -> None:
    with cached(pipe):
        image = pipe(
            **embeds(0), height=32, width=32, num_inference_steps=4, generator=torch.Generator().manual_seed(0)
        ).images[0]
    assert image.size == (32, 32)
