"""Every gate's published rule against a plain reading of it, written here without the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_differs
from families import FAMILIES
from gating import GATES, STEPS, enabled, l1
from pipelines import BlockCounter, count_blocks, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.gates.seacache import SeaCacheRule, sea_filter
from vllm_omni.diffusion.cache.gates.teacache import published_coefficients
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.errors import InvalidValueError
from vllm_omni.quality.teacache_fit import fit_coefficients


class Naive:
    """A plain reading of one rule for one request, on the tensors that its forwards really had."""

    def __init__(self, name: str, threshold: float, sigmas: list[float]) -> None:
        self.name, self.threshold, self.sigmas = name, threshold, sigmas
        self.error = 0.0
        self.before: torch.Tensor | None = None
        self.anchor: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rate: float | None = None
        self.first: torch.Tensor | None = None

    def skips(self, step: int, x: torch.Tensor, modulated: torch.Tensor, first: torch.Tensor) -> bool:
        last, change = len(self.sigmas) - 1, None
        now = {"teacache": modulated, "seacache": self.filtered(x, step)}.get(self.name, x)
        if self.name == "fbcache":
            if self.first is not None:
                change = l1(first - self.first) / l1(self.first)
        elif self.before is not None:
            change = l1(now - self.before) / l1(self.before)
            if self.name == "teacache":
                change = float(np.poly1d(GATES["teacache"]["coefficients"])(change))
            if self.name == "easycache":
                change = None
                if self.rate is not None and self.anchor is not None:
                    change = self.rate * l1(now - self.before) / l1(self.anchor[1])
        self.before = now
        if step < max(1, round(0.1 * (last + 1))) or step == last or change is None:
            return False
        self.error = change if self.name == "fbcache" else self.error + change
        return self.error < self.threshold

    def computed(self, x: torch.Tensor, v: torch.Tensor, first: torch.Tensor) -> None:
        if self.anchor is not None:
            self.rate = l1(v - self.anchor[1]) / l1(x - self.anchor[0])
        self.anchor, self.first, self.error = (x, v), first, 0.0

    def filtered(self, x: torch.Tensor, step: int) -> torch.Tensor:
        side = int(x.shape[1] ** 0.5)
        f = np.fft.fftfreq(side)
        r = np.maximum(np.hypot(f[:, None], f[None, :]), 1 / side)
        gain = 1 / ((1 - self.sigmas[step]) ** 2 + self.sigmas[step] ** 2 * r**2)
        gain /= gain.mean()
        picture = x.float().numpy().reshape(len(x), side, side, -1)
        return torch.from_numpy(
            np.fft.ifft2(gain[None, :, :, None] * np.fft.fft2(picture, axes=(1, 2)), axes=(1, 2)).real
        )


def naive_run(pipeline: Any, name: str, **kwargs: Any) -> tuple[list[bool], torch.Tensor]:
    """One run of a Flux pipeline under the naive rule: (skipped?, latents). Over the model's own modules."""
    model = pipeline.transformer
    state: dict[str, Any] = {"step": 0, "skips": []}
    own = type(model).forward
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]

    def forward(**arguments: Any) -> Any:
        if state["step"] == 0:
            sigmas = pipeline.scheduler.sigmas[:-1].tolist()
            state["rule"] = Naive(name, GATES[name]["rel_l1_thresh"], sigmas)
        seen: dict[str, torch.Tensor] = {}
        handles = [
            blocks[0].attn.register_forward_pre_hook(
                lambda m, a, k: seen.update(modulated=k["hidden_states"] if "hidden_states" in k else a[0]),
                with_kwargs=True,
            ),
            blocks[0].register_forward_hook(
                lambda m, a, k, out: seen.update(enter=k["hidden_states"], first=out[1] - k["hidden_states"]),
                with_kwargs=True,
            ),
            blocks[-1].register_forward_hook(lambda m, a, k, out: seen.update(end=out[1]), with_kwargs=True),
        ]
        output = own(model, **arguments)
        for handle in handles:
            handle.remove()
        rule, x = state["rule"], arguments["hidden_states"]
        skips = rule.skips(state["step"], x, seen["modulated"], seen["first"])
        if skips:
            hidden = seen["enter"] + state["residual"]
            if name == "fbcache":
                hidden = hidden + seen["first"] - state["first"]
            output = (head(model, arguments, hidden),)
        else:
            rule.computed(x, output[0], seen["first"])
            state["residual"], state["first"] = seen["end"] - seen["enter"], seen["first"]
        state["skips"].append(skips)
        state["step"] += 1
        return output

    model.forward = forward
    try:
        latents = run_latents(pipeline, **kwargs)
    finally:
        del model.forward
    return state["skips"], latents


def head(model: Any, arguments: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    timestep = arguments["timestep"].to(hidden.dtype) * 1000
    guidance = arguments["guidance"].to(hidden.dtype) * 1000
    temb = model.time_text_embed(timestep, guidance, arguments["pooled_projections"])
    return model.proj_out(model.norm_out(hidden, temb))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_decides_as_its_published_rule(name: str) -> None:
    pipeline = tiny_flux()
    with torch.no_grad():
        skips, expected = naive_run(pipeline, name, num_inference_steps=STEPS)
    assert 2 <= sum(skips) <= STEPS - 2, skips
    backend = enabled(name, pipeline)
    got = run_latents(pipeline, num_inference_steps=STEPS)
    record = backend.last_request
    assert sorted(record._skipped) == [step for step, skip in enumerate(skips) if skip]
    assert_close(got, expected)
    assert backend.store.used == 0 and backend.store.peak > 0


@pytest.mark.parametrize("name", GATES)
def test_blocks_run_as_decided_and_disable_restores_the_pipeline(name: str) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=STEPS)
    last = BlockCounter(pipeline.transformer.single_transformer_blocks[-1])
    backend = enabled(name, pipeline)
    cached = run_latents(pipeline, num_inference_steps=STEPS)
    assert last.count == backend.last_request.computed_steps == STEPS - backend.last_request.skipped_steps
    assert_differs(cached, plain)
    again = run_latents(pipeline, num_inference_steps=STEPS)
    assert torch.equal(again, cached)
    backend.disable(pipeline)
    assert torch.equal(run_latents(pipeline, num_inference_steps=STEPS), plain)


@pytest.mark.parametrize("name", GATES)
def test_a_threshold_near_zero_computes_every_step(name: str) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=6)
    enabled(name, pipeline, rel_l1_thresh=1e-12)
    assert torch.equal(run_latents(pipeline, num_inference_steps=6), plain)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_without_memory_computes_every_step(name: str) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=6)
    backend = enabled(name, pipeline, memory_budget_mb=0.001)
    assert torch.equal(run_latents(pipeline, num_inference_steps=6), plain)
    assert backend.last_request.skipped_steps == 0 and backend.store.used == 0


def test_published_coefficients_are_taken_by_checkpoint() -> None:
    assert published_coefficients()["black-forest-labs/FLUX.1-dev"][0] == 498.651651
    pipeline = tiny_flux()
    pipeline.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    backend = get_cache_backend("teacache", {})
    assert backend is not None
    backend.enable(pipeline)
    run_latents(pipeline, num_inference_steps=4)


def test_fitted_coefficients_predict_the_change_they_were_fitted_on() -> None:
    pipeline = tiny_flux()
    runs: list[Callable[[], Any]] = [
        lambda i=i: run_latents(pipeline, i, seed=i, num_inference_steps=10) for i in range(3)
    ]
    counter = count_blocks(pipeline)
    coefficients = fit_coefficients(pipeline, runs, degree=2)
    assert len(coefficients) == 3 and np.isfinite(coefficients).all() and counter.count == 30
    modulated: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    attn = pipeline.transformer.transformer_blocks[0].attn
    handles = [
        attn.register_forward_pre_hook(lambda m, a, k: modulated.append(k["hidden_states"]), with_kwargs=True),
        pipeline.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0])),
    ]
    for run in runs:
        run()
    for handle in handles:
        handle.remove()
    x = [l1(b - a) / l1(a) for i in range(30) if i % 10 for a, b in [modulated[i - 1 : i + 1]]]
    y = [l1(b - a) / l1(a) for i in range(30) if i % 10 for a, b in [outputs[i - 1 : i + 1]]]
    assert np.allclose(coefficients, np.polyfit(x, y, 2), rtol=1e-2, atol=1e-3)
    with pytest.raises(InvalidValueError, match="runs must give at least"):
        fit_coefficients(pipeline, [])


def test_the_sea_filter_weakens_the_frequencies_that_noise_covers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    low, high = torch.ones(1, 1, 8, 8), torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert_close(sea_filter(x, 0.0), x)  # without noise all of it, at gain 1
    assert sea_filter(low, 0.9).abs().mean() > 2 * sea_filter(high, 0.9).abs().mean()


def test_easycache_sees_latents_move_that_a_pipeline_writes_in_place() -> None:
    """Kandinsky 5 writes the next latents into the tensor that the last forward got."""
    family = next(family for family in FAMILIES if family.name == "Kandinsky 5 video")
    config = {"rel_l1_thresh": 1e-6}
    with Omni.from_pipe(family.build(), cache_backend="easycache", cache_config=config) as omni:
        params = Params(num_inference_steps=8, seed=0, output_type="latent", **family.settings)
        output = omni.generate(family.prompt(0), params, use_tqdm=False)[0]
    assert output.error is None and output.skipped_steps == 0


@pytest.mark.parametrize(("channels", "shape"), [(2, (1, 3, 4, 8, 8)), (-1, (1, 3, 8, 8, 4))])
def test_seacache_filters_over_space_and_time_wherever_channels_are(channels: int, shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_close(SeaCacheRule(channels).describe(latents, {}, 0.5), sea_filter(latents.movedim(channels, 1), 0.5))
