"""The cache on a denoiser alone: FLUX.2, whose last blocks return text and image tokens together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from pipelines import flux2_inputs, tiny_flux2
from probing import Probe

from vllm_omni.diffusion.cache.magcache import (
    MagCacheBackend,
    MagCacheConfig,
    apply_mag_cache_hook,
)
from vllm_omni.diffusion.cache.standalone import HOOK_NAME, detach
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.hooks.base import HookRegistry
from vllm_omni.errors import InvalidValueError


def drive(transformer: torch.nn.Module, steps: int = 10, branches: int = 1) -> list[torch.Tensor]:
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            for branch in range(branches):
                with transformer.cache_context("cond" if branch == 0 else "uncond"):
                    outputs.append(transformer(**flux2_inputs(step, steps, seed=branch), return_dict=False)[0])
    return outputs


def test_flux2_is_refused_without_its_own_curve() -> None:
    with pytest.raises(InvalidValueError, match=r"mag_ratios.*calibrate"):
        apply_mag_cache_hook(tiny_flux2(), MagCacheConfig(transformer_type="Flux2Transformer2DModel"))


@pytest.mark.parametrize("branches", [1, 2])
def test_flux2_residual_is_that_of_the_image_tokens(branches: int) -> None:
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
                    assert_close(added[step], last, scale=probe.before[branch::branches][step])
                    assert added[step].norm() > 0.01 * probe.before[branch::branches][step].norm()
    probe.remove()
    detach(transformer)
    assert all(map(torch.equal, drive(transformer, branches=branches), plain))


def stopped(transformer: torch.nn.Module, error: type[BaseException], call: int = 4) -> None:
    """A run whose given call is ended by `error`, within the denoiser."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == call:
            raise error

    handle = transformer.x_embedder.register_forward_hook(fail)
    with pytest.raises(error):
        drive(transformer)
    handle.remove()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=["raises", "interrupted"])
def test_a_run_after_one_that_failed_begins_at_its_first_step(error: type[BaseException]) -> None:
    transformer = tiny_flux2()
    config = MagCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10, max_skip_steps=2, retention_ratio=0.3)
    hook = apply_mag_cache_hook(transformer, config)
    wanted = drive(transformer)
    stopped(transformer, error)
    assert all(map(torch.equal, drive(transformer), wanted))
    stopped(transformer, error, call=7)
    HookRegistry.get_or_create(transformer).reset_hook(HOOK_NAME)
    assert all(map(torch.equal, drive(transformer), wanted))
    assert hook.session.state is not None
    assert hook.session.state.computed_steps + hook.session.state.skipped_steps == 10


@pytest.mark.parametrize("before", [4, 10, 20])
@pytest.mark.parametrize("steps", [None, 6, 10])
def test_refresh_begins_a_run_wherever_the_calls_before_it_ended(before: int, steps: int | None) -> None:
    bare = SimpleNamespace(transformer=tiny_flux2())
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10))
    backend.enable(bare)
    drive(bare.transformer, before)
    backend.refresh(bare, steps)
    outputs = drive(bare.transformer, steps or 10)
    state = backend.last_request
    assert state is not None and state.plan is not None
    assert state.computed_steps + state.skipped_steps == len(state.plan.compute) == (steps or 10)
    assert state.skipped_steps > 0
    backend.disable(bare)
    backend.enable(bare)
    backend.refresh(bare, steps)
    assert all(map(torch.equal, drive(bare.transformer, steps or 10), outputs))
    backend.disable(bare)
