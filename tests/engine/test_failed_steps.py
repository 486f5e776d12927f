"""A joint call that fails is made again one by one; each request ends as it would have alone, with the same counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import assert_close
from gating import GATES, asked
from pipelines import CURVE, DEFAULTS, embeds, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.gates.gate import GatedState
from vllm_omni.kernels import ops

CACHES: dict[str, Any] = {
    "rule": {"threshold": 0.24, "max_skip_steps": 3},
    "budget, linear": {"nfe": 6, "predictor": "linear"},
    **{name: asked(name) for name in GATES},
}
SEEDS = (0, 1, 2)
STEPS = 12


class Out(RuntimeError):
    """Stands for a device that has no room for the joint call."""


class Fault:
    """Fails calls of more than one row: the `nth` of them, once."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.met = 0
        self.failed = False

    def meet(self, rows: int) -> None:
        self.met += rows > 1
        if rows > 1 and self.met == self.nth and not self.failed:
            self.failed = True
            raise Out("out of memory")


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    config = {"mag_ratios": CURVE}
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS, cache_backend="magcache", cache_config=config) as engine:
        yield engine


def generate(omni: Omni, seeds: tuple[int, ...], cache: Any, **params: Any) -> list[Any]:
    asked_for = [
        Params(num_inference_steps=STEPS, seed=s, cache=cache, **{"output_type": "latent"} | params) for s in seeds
    ]
    return omni.generate([embeds(s) for s in seeds], asked_for, use_tqdm=False)


def same(together: list[Any], alone: list[Any]) -> None:
    for got, own in zip(together, alone, strict=True):
        assert got.error is None, got.error
        assert (got.computed_steps, got.skipped_steps) == (own.computed_steps, own.skipped_steps)
        assert got.plan == own.plan
        assert (got.latents - own.latents).abs().max() <= 1e-5 * own.latents.abs().max()


def fail_with(omni: Omni, seeds: tuple[int, ...], cache: Any, fault: Fault, put: Callable[[], Any]) -> list[Any]:
    handle = put()
    try:
        outputs = generate(omni, seeds, cache)
    finally:
        handle.remove()
    assert fault.failed, "the test met no joint call to fail"
    assert omni.engine.worker.cache_bytes == 0
    return outputs


@pytest.mark.parametrize("nth", [3, 7])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_joint_forward_or_probe_that_fails(omni: Omni, cache: str, when: str, nth: int) -> None:
    """Before: nothing has run. After: the forward has run, and what it gave is lost."""
    alone = [generate(omni, (seed,), CACHES[cache])[0] for seed in SEEDS]
    fault, transformer = Fault(nth), omni.engine.worker.pipeline.transformer

    def meet(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
        fault.meet(len(kwargs["hidden_states"]))

    register = transformer.register_forward_pre_hook if when == "before" else transformer.register_forward_hook
    same(fail_with(omni, SEEDS, CACHES[cache], fault, lambda: register(meet, with_kwargs=True)), alone)


@pytest.mark.parametrize("cache", GATES)
def test_a_joint_decision_that_fails(omni: Omni, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """The second request's comparison fails: what the first one's gate has seen must not count twice."""
    alone = [generate(omni, (seed,), CACHES[cache])[0] for seed in SEEDS]
    fault, change = Fault(8), GatedState.change

    def fails(self: GatedState, key: Any, step: int, now: torch.Tensor) -> Any:
        fault.meet(2)
        return change(self, key, step, now)

    monkeypatch.setattr(GatedState, "change", fails)
    together = generate(omni, SEEDS, CACHES[cache])
    assert fault.failed
    same(together, alone)


@pytest.mark.parametrize("cache", CACHES)
def test_a_residual_that_finds_no_memory(omni: Omni, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """The second request's residual cannot be made: the first one's, made before it, must not stay."""
    alone = [generate(omni, (seed,), CACHES[cache])[0] for seed in SEEDS]
    fault, residual = Fault(2), ops.residual

    def fails(after: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> Any:
        fault.meet(2)
        return residual(after, before, dtype)

    monkeypatch.setattr(ops, "residual", fails)
    together = generate(omni, SEEDS, CACHES[cache])
    assert fault.failed
    same(together, alone)


@pytest.mark.parametrize("cache", ["rule", "seacache"])
def test_a_joint_decode_that_fails(omni: Omni, cache: str) -> None:
    alone = [generate(omni, (seed,), CACHES[cache], output_type="np")[0] for seed in SEEDS]
    fault, decoder = Fault(1), omni.engine.worker.pipeline.vae.decoder
    handle = decoder.register_forward_pre_hook(lambda module, args: fault.meet(len(args[0])))
    try:
        together = generate(omni, SEEDS, CACHES[cache], output_type="np")
    finally:
        handle.remove()
    assert fault.failed
    for got, own in zip(together, alone, strict=True):
        assert got.error is None and got.computed_steps == own.computed_steps
        assert_close(got.images[0], own.images[0])
