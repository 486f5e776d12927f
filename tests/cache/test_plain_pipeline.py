"""The cache on a plain diffusers pipeline, without the engine: what it computes, keeps, and leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from pipelines import CURVE, count_blocks, embeds, flux2_inputs, negative, run_latents, tiny_flux, tiny_flux2
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_omni.diffusion.cache.magcache import (
    FluxMagCacheStrategy,
    MagCacheBackend,
    MagCacheConfig,
    apply_mag_cache_hook,
)
from vllm_omni.diffusion.cache.profile import CacheProfile, fingerprint, load_profile
from vllm_omni.diffusion.cache.standalone import detach
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.hooks.conditioning import Conditioning
from vllm_omni.errors import InvalidValueError

RESIDUAL_BYTES = 64 * 32 * 4  # 32 x 32 pixels are 64 tokens of width 32, in float32
CFG = {"true_cfg_scale": 3.0, **negative(0)}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return tiny_flux()


@pytest.fixture(scope="module")
def plain(pipe: FluxPipeline) -> dict[int, torch.Tensor]:
    """Latents without any cache, by step count."""
    return {steps: run_latents(pipe, num_inference_steps=steps) for steps in (4, 10, 28, 50)}


@contextmanager
def cached(pipeline: Any, **settings: Any) -> Iterator[MagCacheBackend]:
    if not {"profile", "mag_calibrate", "mag_ratios"} & settings.keys():
        settings["mag_ratios"] = CURVE
    backend = MagCacheBackend(DiffusionCacheConfig(**settings))
    backend.enable(pipeline)
    try:
        yield backend
    finally:
        backend.disable(pipeline)


def sigmas_of(pipeline: Any) -> tuple[float, ...]:
    return tuple(pipeline.scheduler.sigmas.tolist()[:-1])


class Probe:
    """Per transformer call: whether the blocks ran, and what the stack (or its stand-in) added to the image tokens."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.before: list[torch.Tensor] = []
        self.added: list[torch.Tensor] = []
        self.ran: list[bool] = []
        self._ran = False
        self._handles = [
            transformer.x_embedder.register_forward_hook(self._embedded),
            transformer.transformer_blocks[0].register_forward_pre_hook(self._block),
            transformer.norm_out.register_forward_pre_hook(self._head),
        ]

    def _embedded(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.before.append(output.detach().clone())
        self._ran = False

    def _block(self, module: Any, args: Any) -> None:
        self._ran = True

    def _head(self, module: Any, args: Any) -> None:
        self.added.append(args[0].detach() - self.before[-1])
        self.ran.append(self._ran)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def probed(pipeline: Any) -> Iterator[Probe]:
    probe = Probe(pipeline.transformer)
    try:
        yield probe
    finally:
        probe.remove()


# ------------------------------------------------------------------------------------------------ what it computes


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
def test_any_step_counts_in_any_order_compute_what_their_own_plan_says(
    pipe: FluxPipeline, order: tuple[int | None, ...]
) -> None:
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


def test_the_blocks_run_at_exactly_the_steps_of_the_plan(pipe: FluxPipeline) -> None:
    with cached(pipe) as backend, probed(pipe) as probe:
        run_latents(pipe, num_inference_steps=28)
        assert tuple(probe.ran) == backend.plan(28, sigmas_of(pipe)).compute


def test_a_warm_up_changes_nothing(pipe: FluxPipeline) -> None:
    with cached(pipe) as backend:
        first = run_latents(pipe, num_inference_steps=10)
        backend.refresh(pipe, 1)
        run_latents(pipe, num_inference_steps=1, i=3)
        run_latents(pipe, num_inference_steps=28, i=2, seed=9)
        assert torch.equal(run_latents(pipe, num_inference_steps=10), first)
        backend.refresh(pipe, 99)  # what is announced does not matter, the schedule does
        assert torch.equal(run_latents(pipe, num_inference_steps=10), first)


def test_where_nothing_skips_the_latents_are_bit_identical(pipe: FluxPipeline, plain: dict[int, torch.Tensor]) -> None:
    """The published curve holds exact ones, whose error is 0 at any threshold; so a curve without."""
    with cached(pipe, mag_threshold=1e-9, mag_ratios=[1.0] + [1.001] * 27) as backend:
        for steps in (4, 28):
            assert torch.equal(run_latents(pipe, num_inference_steps=steps), plain[steps])
        assert backend.last_request is not None and backend.last_request.skipped_steps == 0


def test_disable_leaves_no_trace(plain: dict[int, torch.Tensor]) -> None:
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


# ------------------------------------------------------------------------------------------------------ two branches


def test_two_branches_share_the_decision_and_never_a_residual(pipe: FluxPipeline) -> None:
    with cached(pipe, predictor="reuse") as backend, probed(pipe) as probe:
        run_latents(pipe, num_inference_steps=28, **CFG)
        plan = backend.plan(28, sigmas_of(pipe)).compute
        peak, used = backend.store.peak, backend.store.used
    assert len(probe.ran) == 56
    for branch in (0, 1):
        assert tuple(probe.ran[branch::2]) == plan
        added, last = probe.added[branch::2], None
        for step, computed in enumerate(plan):
            if computed:
                last = added[step]
            else:
                torch.testing.assert_close(added[step], last, atol=1e-5, rtol=1e-5)
    apart = [(a - b).norm() / a.norm() for a, b in zip(probe.added[::2], probe.added[1::2], strict=True)]
    assert min(apart) > 0.01  # so a shared residual would have been seen
    assert (peak, used) == (2 * RESIDUAL_BYTES, 0)


def test_a_branch_that_stops_or_starts_late_follows_its_own_calls() -> None:
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


def test_several_images_per_prompt(pipe: FluxPipeline) -> None:
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=10, num_images_per_prompt=3)
        assert backend.store.peak == 3 * RESIDUAL_BYTES and backend.store.used == 0


# ------------------------------------------------------------------------------------------------- what comes between


def test_replacing_the_scheduler_between_runs(pipe: FluxPipeline) -> None:
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


def test_an_exception_frees_what_was_held(pipe: FluxPipeline) -> None:
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


def test_a_skipped_step_is_never_the_identity(pipe: FluxPipeline) -> None:
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
        torch.testing.assert_close(probe.added[step], line, atol=1e-4, rtol=1e-4)
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", ["controlnet_block_samples", "controlnet_single_block_samples"])
def test_controlnet_samples_force_computed_steps(pipe: FluxPipeline, plain: dict[int, torch.Tensor], name: str) -> None:
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


def test_controlnet_samples_at_some_steps_force_those(pipe: FluxPipeline) -> None:
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


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("predictor", "residuals"), [("reuse", 1), ("linear", 2)])
@pytest.mark.parametrize("branches", [1, 2])
def test_memory_is_one_residual_per_branch_for_reuse_and_two_for_linear(
    pipe: FluxPipeline, predictor: str, residuals: int, branches: int
) -> None:
    with cached(pipe, predictor=predictor) as backend:
        run_latents(pipe, num_inference_steps=28, **(CFG if branches == 2 else {}))
        assert backend.store.peak == residuals * branches * RESIDUAL_BYTES
        assert backend.store.used == 0


def test_no_bytes_where_nothing_skips(pipe: FluxPipeline) -> None:
    with cached(pipe, mag_threshold=1e-9, mag_ratios=[1.0] + [1.001] * 27) as backend:
        run_latents(pipe, num_inference_steps=10)
        assert backend.store.peak == 0


@pytest.mark.parametrize(("predictor", "branches"), [("reuse", 2), ("linear", 1), ("linear", 2)])
def test_a_budget_of_one_residual_computes_more_and_stays_right(
    pipe: FluxPipeline, predictor: str, branches: int
) -> None:
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
def test_without_room_for_one_residual_it_is_the_plain_pipeline(
    pipe: FluxPipeline, plain: dict[int, torch.Tensor], budget: float
) -> None:
    with cached(pipe, memory_budget_mb=budget) as backend:
        assert torch.equal(run_latents(pipe, num_inference_steps=28), plain[28])
        assert backend.store.peak == 0 and backend.last_request is not None
        assert backend.last_request.computed_steps == 28


# -------------------------------------------------------------------------------------------------------- calibration


@pytest.fixture(scope="module")
def calibrated(pipe: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheProfile, Path]:
    """A profile of tiny_flux from two prompts at 12 steps, one of them with two branches."""
    pipeline = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    backend.enable(pipeline)
    with probed(pipeline) as probe:
        run_latents(pipeline, num_inference_steps=12)
        run_latents(pipeline, i=1, seed=1, num_inference_steps=12)
    assert backend.calibration is not None and all(probe.ran)
    profile = backend.calibration.profile("tiny", "FluxTransformer2DModel", fingerprint(pipe.transformer))
    backend.disable(pipeline)

    runs = [probe.added[:12], probe.added[12:]]
    ratios, grams = [], []
    for residuals in runs:
        norms = [r.double().norm(dim=-1) for r in residuals]
        ratios.append([1.0, *(float((b / a).mean()) for a, b in pairwise(norms))])
        flat = torch.stack([r.double().flatten() for r in residuals]).numpy()
        grams.append(flat @ flat.T / flat.shape[1])
    assert np.allclose(profile.ratios, np.mean(ratios, axis=0), atol=1e-4)
    assert profile.gram is not None
    assert np.allclose(profile.gram, np.mean(grams, axis=0), rtol=1e-3)
    path = tmp_path_factory.mktemp("profiles") / "deeper" / "tiny.json"
    profile.save(path)
    return profile, path


def test_calibration_measures_what_the_blocks_add(calibrated: tuple[CacheProfile, Path]) -> None:
    profile, path = calibrated
    gram = np.array(profile.gram)
    assert profile.ratios[0] == 1.0 and gram.shape == (12, 12)
    assert np.allclose(gram, gram.T) and np.linalg.eigvalsh(gram)[0] > -1e-6 * np.trace(gram)
    assert profile.provenance["prompts"] == 2 and profile.provenance["steps"] == 12
    loaded = load_profile(path)
    assert (loaded.name, loaded.fingerprint, loaded.ratios) == (profile.name, profile.fingerprint, profile.ratios)
    assert (loaded.sigmas, loaded.gram, loaded.branches) == (profile.sigmas, profile.gram, profile.branches)


def test_calibration_keeps_branches_apart_and_changes_no_picture(
    pipe: FluxPipeline, plain: dict[int, torch.Tensor]
) -> None:
    with cached(pipe, mag_calibrate=True) as backend, probed(pipe) as probe:
        assert torch.equal(run_latents(pipe, num_inference_steps=10), plain[10])
        backend.refresh(pipe, 10)
        run_latents(pipe, num_inference_steps=10, **CFG)
        assert backend.calibration is not None
        profile = backend.calibration.profile("tiny", "FluxTransformer2DModel", "f")
    assert len(profile.branches) == 2
    uncond = [r.norm(dim=-1) for r in probe.added[10:][1::2]]
    wanted = [1.0, *(float((b / a).mean()) for a, b in pairwise(uncond))]
    assert np.allclose(list(profile.branches.values())[1], wanted, atol=1e-4)


def test_a_failed_prompt_does_not_enter_the_calibration(pipe: FluxPipeline) -> None:
    with cached(pipe, mag_calibrate=True) as backend:
        assert backend.calibration is not None
        with pytest.raises(InvalidValueError, match="at least one"):
            backend.calibration.profile("x", "FluxTransformer2DModel", "f")
        run_latents(pipe, num_inference_steps=10)
        with pytest.raises(InvalidValueError, match="same schedule"):
            run_latents(pipe, num_inference_steps=4)
        assert backend.calibration.requests == 1


@pytest.mark.parametrize("steps", [4, 12, 28, 50])
def test_a_profile_file_serves_any_step_count(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], steps: int
) -> None:
    _, path = calibrated
    exact = run_latents(pipe, num_inference_steps=steps)
    blocks = count_blocks(pipe)
    with cached(pipe, profile=str(path), predictor="gram", mag_threshold=0.5) as backend:
        latents = run_latents(pipe, num_inference_steps=steps)
        plan = backend.plan(steps, sigmas_of(pipe))
        assert backend.last_request is not None and backend.last_request.settings["predictor"] == "gram"
        assert blocks.count == plan.full_forwards and backend.store.used == 0
        assert backend.store.peak <= 2 * RESIDUAL_BYTES
    assert (latents - exact).norm() < 0.2 * exact.norm()
    blocks.remove()


def test_a_request_may_bring_its_own_profile(pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path]) -> None:
    """As the engine does: `refresh` with a request's settings over an engine that has only a curve."""
    _, path = calibrated
    own = DiffusionCacheConfig(profile=str(path), predictor="gram")
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=10)
        record = backend.refresh(pipe, 10, request_id="r", config=own)
        assert record is not None
        assert record.settings["predictor"] == "gram" and record.settings["profile"] == "tiny"


def broken(path: Path, profile: CacheProfile, how: str) -> str:
    text = profile.model_dump_json()
    content = json.loads(text)
    if how == "truncated":
        text = text[: len(text) // 2]
    elif how == "not json":
        text = "\x80\x02not json"
    elif how == "a list":
        text = "[1, 2]"
    else:
        if how == "nan ratio":
            content["ratios"][3] = float("nan")
        elif how == "zero ratio":
            content["ratios"][3] = 0.0
        elif how == "nan gram":
            content["gram"][0][0] = float("nan")
        elif how == "not psd":
            content["gram"] = (-np.array(content["gram"])).tolist()
        elif how == "not symmetric":
            content["gram"][0][1] += 1e3
        elif how == "ragged":
            content["gram"][2] = content["gram"][2][:-1]
        elif how == "short sigmas":
            content["sigmas"] = content["sigmas"][:-1]
        elif how == "unknown key":
            content["ratio"] = content.pop("ratios")
        elif how == "wrong class":
            content["transformer_class"] = "WanTransformer3DModel"
        text = json.dumps(content)
    path.write_text(text)
    return str(path)


BROKEN = {
    "truncated": "JSON",
    "not json": "JSON",
    "a list": "dict",
    "nan ratio": r"ratios\[3\]",
    "zero ratio": r"ratios\[3\]",
    "nan gram": "gram",
    "not psd": "gram.*positive semi-definite",
    "not symmetric": "gram.*symmetric",
    "ragged": "gram",
    "short sigmas": "sigmas",
    "unknown key": "ratio",
    "wrong class": "FluxTransformer2DModel",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_profile_file_loads_nothing(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], tmp_path: Path, how: str
) -> None:
    file = broken(tmp_path / "bad.json", calibrated[0], how)
    backend = MagCacheBackend(DiffusionCacheConfig(profile=file))
    with pytest.raises(InvalidValueError, match=BROKEN[how]):
        backend.enable(pipe)
    assert not backend.is_enabled() and not backend.profiles
    assert not pipe.transformer._forward_hooks and not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


@pytest.mark.parametrize("how", [how for how in BROKEN if how != "wrong class"])
def test_the_error_names_the_file(calibrated: tuple[CacheProfile, Path], tmp_path: Path, how: str) -> None:
    file = broken(tmp_path / "bad.json", calibrated[0], how)
    with pytest.raises(InvalidValueError, match=r"bad\.json"):
        load_profile(Path(file))


def test_a_requests_profile_must_be_of_the_class_too(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], tmp_path: Path
) -> None:
    file = broken(tmp_path / "bad.json", calibrated[0], "wrong class")
    with cached(pipe) as backend, pytest.raises(InvalidValueError, match="FluxTransformer2DModel"):
        backend.check(DiffusionCacheConfig(profile=file))


def test_a_missing_profile_lists_the_shipped_ones(pipe: FluxPipeline) -> None:
    with pytest.raises(InvalidValueError, match=r"profile must be a profile file, or a name such as 'demo'.*nowhere"):
        MagCacheBackend(DiffusionCacheConfig(profile="/nowhere.json")).enable(pipe)


def test_the_gram_predictor_needs_a_matrix_and_says_so_at_start_up() -> None:
    """Point 14: bad combinations are refused at start-up, not at the first request."""
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE, predictor="gram"))
    with pytest.raises(InvalidValueError, match=r"predictor.*calibrate"):
        backend.enable(pipe)
    assert not backend.is_enabled() and not pipe.transformer._forward_hooks


# ---------------------------------------------------------------------------------------------------- torch.compile


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
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- no host sync


class Sync(Exception):
    """A tensor's value was asked for."""


_READS = {"item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
_READS |= {"equal", "allclose", "is_nonzero", "nonzero", "__array__", "eq", "ne", "lt", "le", "gt", "ge"}
_OPS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "item"}


class FunctionTrap(TorchFunctionMode):
    """Python-level reads: on CPU tensors `.cpu()` is a no-op that no dispatcher sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        moves = name == "to" and "cpu" in [str(a) for a in (*args[1:], *kwargs.values()) if not torch.is_tensor(a)]
        diffusers = "diffusers" in Path(sys._getframe(1).f_code.co_filename).parts  # its `.to(ids.device)` stays
        if name in _READS or (moves and not diffusers):
            raise Sync(name)
        return func(*args, **kwargs)


class DispatchTrap(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _OPS:
            raise Sync(str(func))
        return func(*args, **(kwargs or {}))


class Trap:
    """Traps reads from the outermost pre hook of the transformer to its outermost post hook, but for step 0.

    What is trapped stands for a device, where no conditioning is remembered (test_conditioning.py: not a value is read
    there); so none is here.
    """

    def __init__(self, transformer: torch.nn.Module, calls_of_first_step: int = 1) -> None:
        self.calls = self.trapped = 0
        self._first = calls_of_first_step
        self._modes: list[Any] = []
        self._own = Conditioning.enter
        Conditioning.enter = lambda self, memory: None  # type: ignore[method-assign]
        self._handles = [
            transformer.register_forward_pre_hook(self._enter, prepend=True),
            transformer.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, *args: Any) -> None:
        self.calls += 1
        if self.calls > self._first:
            self.trapped += 1
            self._modes = [DispatchTrap(), FunctionTrap()]
            for mode in self._modes:
                mode.__enter__()

    def _leave(self, *args: Any) -> None:
        while self._modes:
            self._modes.pop().__exit__(None, None, None)

    def remove(self) -> None:
        Conditioning.enter = self._own  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("predictor", ["reuse", "linear", "gram"])
@pytest.mark.parametrize("branches", [1, 2])
def test_no_host_sync_on_any_planned_step(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], predictor: str, branches: int
) -> None:
    source: dict[str, Any] = {"profile": str(calibrated[1])} if predictor == "gram" else {"mag_ratios": CURVE}
    with cached(pipe, predictor=predictor, mag_threshold=0.5, **source) as backend:
        trap = Trap(pipe.transformer, calls_of_first_step=branches)
        try:
            run_latents(pipe, num_inference_steps=10, **(CFG if branches == 2 else {}))
        finally:
            trap.remove()
        assert trap.trapped == 9 * branches
        assert backend.last_request is not None and backend.last_request.skipped_steps > 0


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
        lambda x: x.tolist(),
        lambda x: bool(x.sum()),
        lambda x: float(x.sum()),
        lambda x: x.sum() > 0,
        lambda x: torch.equal(x, x),
        lambda x: x.detach().numpy(),
    ],
)
def test_the_trap_traps(pipe: FluxPipeline, read: Any) -> None:
    """A canary: a hook of a later registration than the trap's pre hook reads a value at the second step."""
    with cached(pipe):

        def sing(module: Any, args: Any, output: torch.Tensor) -> None:
            read(output)

        canary = pipe.transformer.norm_out.register_forward_hook(sing)
        trap = Trap(pipe.transformer)
        try:
            with pytest.raises(Sync):
                run_latents(pipe, num_inference_steps=4)
        finally:
            trap.remove()
            canary.remove()


# -------------------------------------------------------------------------------------------------- a bare denoiser


def drive(transformer: torch.nn.Module, steps: int = 10, branches: int = 1) -> list[torch.Tensor]:
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            for branch in range(branches):
                with transformer.cache_context("cond" if branch == 0 else "uncond"):
                    outputs.append(transformer(**flux2_inputs(step, steps, seed=branch), return_dict=False)[0])
    return outputs


def test_flux2_needs_a_curve_of_its_own() -> None:
    with pytest.raises(InvalidValueError, match=r"mag_ratios.*calibrate"):
        apply_mag_cache_hook(tiny_flux2(), MagCacheConfig(transformer_type="Flux2Transformer2DModel"))


@pytest.mark.parametrize("branches", [1, 2])
def test_flux2_tail_gives_the_image_residual(branches: int) -> None:
    """Point 5: its single blocks return the fused text+image sequence; what is kept is the image's share."""
    transformer = tiny_flux2()
    plain = drive(transformer, branches=branches)
    config = MagCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10, max_skip_steps=2, retention_ratio=0.3)
    apply_mag_cache_hook(transformer, config)
    probe = Probe(transformer)
    for _ in range(2):  # the second run begins afresh
        probe.added.clear(), probe.ran.clear(), probe.before.clear()
        got = drive(transformer, branches=branches)
        for branch in range(branches):
            ran, added = probe.ran[branch::branches], probe.added[branch::branches]
            assert ran == [True, True, True, False, False, True, False, False, True, True]
            for step in range(10):
                if ran[step]:
                    last = added[step]
                    assert torch.equal(got[branch::branches][step], plain[branch::branches][step])
                else:
                    torch.testing.assert_close(added[step], last, atol=1e-5, rtol=1e-5)
                    assert added[step].norm() > 0.01 * probe.before[branch::branches][step].norm()
    probe.remove()
    detach(transformer)
    assert all(map(torch.equal, drive(transformer, branches=branches), plain))


def test_images_decode_too(pipe: FluxPipeline) -> None:
    with cached(pipe):
        image = pipe(
            **embeds(0), height=32, width=32, num_inference_steps=4, generator=torch.Generator().manual_seed(0)
        ).images[0]
    assert image.size == (32, 32)
