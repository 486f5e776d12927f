"""Gates that look at data: each published rule against a naive one written here, and every request on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family
from pipelines import BlockCounter, count_blocks, embeds, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.seacache import sea_filter
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.cache.teacache import fit_coefficients, published_coefficients
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoisers import DENOISER_NAMES, DENOISERS
from vllm_omni.errors import InvalidValueError, OmniError

STEPS = 12
# Thresholds at which a random model's run both skips and computes.
GATES: dict[str, dict[str, Any]] = {
    "easycache": {"rel_l1_thresh": 0.12},
    "seacache": {"rel_l1_thresh": 0.2},
    "teacache": {"rel_l1_thresh": 0.25, "coefficients": [1.0, 0.02]},
    "fbcache": {"rel_l1_thresh": 0.25},
}
CURVE = [1.0] + [0.97] * 27


@pytest.fixture(scope="module")
def tiny() -> Iterator[Omni]:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults={"height": 32, "width": 32}
    ) as omni:
        yield omni


def params(cache: Any, seed: int = 0, steps: int = STEPS, **others: Any) -> Params:
    return Params(num_inference_steps=steps, seed=seed, cache=cache, output_type="latent", **others)


def asked(name: str, **more: Any) -> dict[str, Any]:
    return {"backend": name, **GATES[name], **more}


# ------------------------------------------------------------------------------------------ the rules, written anew


def l1(a: torch.Tensor) -> float:
    return float(a.float().abs().mean())


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


def enabled(name: str, pipeline: Any, **more: Any) -> Any:
    backend = get_cache_backend(name, {**GATES[name], **more})
    assert backend is not None
    backend.enable(pipeline)
    return backend


@pytest.mark.parametrize("name", GATES)
def test_the_published_rule(name: str) -> None:
    pipeline = tiny_flux()
    with torch.no_grad():
        skips, expected = naive_run(pipeline, name, num_inference_steps=STEPS)
    assert 2 <= sum(skips) <= STEPS - 2, skips
    backend = enabled(name, pipeline)
    got = run_latents(pipeline, num_inference_steps=STEPS)
    record = backend.last_request
    assert sorted(record._skipped) == [step for step, skip in enumerate(skips) if skip]
    assert torch.allclose(got, expected, atol=1e-4)
    assert backend.store.used == 0 and backend.store.peak > 0


@pytest.mark.parametrize("name", GATES)
def test_blocks_really_run_as_decided_and_disable_leaves_nothing(name: str) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=STEPS)
    last = BlockCounter(pipeline.transformer.single_transformer_blocks[-1])
    backend = enabled(name, pipeline)
    cached = run_latents(pipeline, num_inference_steps=STEPS)
    assert last.count == backend.last_request.computed_steps == STEPS - backend.last_request.skipped_steps
    assert not torch.allclose(cached, plain, atol=1e-6)
    again = run_latents(pipeline, num_inference_steps=STEPS)
    assert torch.equal(again, cached)
    backend.disable(pipeline)
    assert torch.equal(run_latents(pipeline, num_inference_steps=STEPS), plain)


@pytest.mark.parametrize("name", GATES)
def test_a_threshold_of_almost_nothing_is_exact(name: str) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=6)
    enabled(name, pipeline, rel_l1_thresh=1e-12)
    assert torch.equal(run_latents(pipeline, num_inference_steps=6), plain)


# --------------------------------------------------------------------------------------------------- batches, isolation


def check_batch(omni: Omni, prompts: list[Any], requests: list[Params]) -> list[Any]:
    together = omni.generate(prompts, requests, use_tqdm=False)
    for prompt, request, mixed in zip(prompts, requests, together, strict=True):
        assert mixed.error is None, mixed.error
        alone = omni.generate([prompt], [request], use_tqdm=False)[0]
        assert (mixed.latents - alone.latents).abs().max() < 1e-4, request.cache
        assert mixed.skipped_steps == alone.skipped_steps and mixed.computed_steps == alone.computed_steps
    assert omni.engine.worker.cache_bytes == 0
    return together


@pytest.mark.parametrize("name", GATES)
def test_a_batch_of_one_gate_equals_each_request_alone(tiny: Omni, name: str) -> None:
    steps = (STEPS, 9, 15, STEPS)
    requests = [params(asked(name), i, n, guidance_scale=2.0 + i) for i, n in enumerate(steps)]
    requests.append(params(asked(name, rel_l1_thresh=1e-9), 7))
    outputs = check_batch(tiny, [embeds(i) for i in range(5)], requests)
    assert all(o.skipped_steps > 0 for o in outputs[:4]) and outputs[4].skipped_steps == 0
    assert outputs[0].cache_settings["backend"] == name


def test_gates_promises_presets_and_off_in_one_batch(tiny: Omni) -> None:
    caches: list[Any] = [
        *(asked(name) for name in GATES),
        *(asked(name, predictor="linear") for name in GATES),
        {"nfe": 5},
        {"speedup": 2.0},
        "fast",
        "off",
        None,
    ]
    outputs = check_batch(tiny, [embeds(i) for i in range(len(caches))], [params(c, i) for i, c in enumerate(caches)])
    assert outputs[8].computed_steps == 5 and outputs[9].computed_steps == 6 and outputs[11].skipped_steps == 0


@pytest.mark.parametrize("name", GATES)
def test_several_images_of_a_prompt_decide_together(tiny: Omni, name: str) -> None:
    requests = [params(asked(name), 3, num_outputs_per_prompt=3), params(asked(name), 4)]
    outputs = check_batch(tiny, [embeds(0), embeds(1)], requests)
    assert outputs[0].latents.shape[0] == 3 and outputs[0].skipped_steps > 0


def test_a_neighbour_that_never_rests_changes_nobody(tiny: Omni) -> None:
    """One request jumps so far each step that a mean over the batch would make all compute."""
    for name in GATES:
        calm, wild = params(asked(name), 0), params(asked(name), 1, sigmas=[1.0, 0.05, 0.9, 0.1, 0.8, 0.02], steps=6)
        alone = tiny.generate([embeds(0)], [calm], use_tqdm=False)[0]
        mixed, _ = tiny.generate([embeds(0), embeds(1)], [calm, wild], use_tqdm=False)
        assert mixed.skipped_steps == alone.skipped_steps > 0
        assert (mixed.latents - alone.latents).abs().max() < 1e-4


def test_one_read_per_batch_and_none_for_planned_requests(tiny: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    own = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.ndim == 1 and tensor.dtype == torch.float32:
            reads.append(len(tensor))
        return own(tensor)

    def count(caches: list[Any]) -> list[int]:
        reads.clear()
        tiny.generate(
            [embeds(i) for i in range(len(caches))], [params(c, i) for i, c in enumerate(caches)], use_tqdm=False
        )
        return [n for n in reads if n < STEPS]  # a schedule is longer

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    assert count([{"nfe": 5}, "fast", "off"]) == []
    four = count([asked("easycache")] * 2 + [asked("seacache")] * 2 + [{"nfe": 5}, "off"])
    assert max(four) == 4 and len(four) <= sum(four) / 2


GUIDED = [family for family in FAMILIES if family.negative and family.guidance]
# What a gate cannot look at: it says so, at the start where the model tells, else to the request.
BLIND = {
    ("Z-Image", name): "cannot look at ZImageTransformer2DModel, whose latents come as a list" for name in GATES
} | {
    (family, "seacache"): "cannot be laid out as a picture"  # the given picture's tokens stand behind the latents
    for family in ("FLUX.1 Kontext", "Qwen-Image-Edit", "Qwen-Image-Edit-Plus")
}


@pytest.mark.parametrize(("family", "name"), BLIND)
def test_a_gate_says_what_it_cannot_look_at(family: str, name: str) -> None:
    chosen = next(f for f in FAMILIES if f.name == family)
    settings = {"num_inference_steps": 6, "output_type": "latent"}
    try:
        with Omni.from_pipe(
            chosen.build(), cache_backend=name, cache_config=GATES[name], defaults=chosen.settings
        ) as omni:
            error = omni.generate(chosen.prompt(0), Params(**settings), use_tqdm=False)[0].error
    except InvalidValueError as refused:
        error = refused
    assert BLIND[family, name] in str(error)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("family", GUIDED, ids=lambda f: f.name)
def test_families_with_guidance(family: Family, name: str) -> None:
    """Both branches keep residuals of their own and follow one decision."""
    if (family.name, name) in BLIND:
        pytest.skip("this gate cannot look at this family, see above")
    pipeline = family.build()
    experts = [m for n in DENOISER_NAMES if (m := pipeline.components.get(n)) is not None]
    last = [m.get_submodule(DENOISERS[type(m).__name__].stack[-1].name)[-1] for m in experts]
    counters = [BlockCounter(block) for block in last]
    settings = {**GATES[name], "rel_l1_thresh": 1e9 if name == "seacache" else 0.9, "mag_max_skip_steps": 1}
    requests = [
        Params(**{"num_inference_steps": 6, "seed": i, "output_type": "latent", family.guidance: 2.0 + i})
        for i in range(2)
    ]
    prompts = [family.prompt(i) for i in range(2)]
    with Omni.from_pipe(pipeline, defaults=family.settings) as omni:
        omni.generate(prompts[:1], requests[:1], use_tqdm=False)
        per_step = sum(counter.count for counter in counters) // 6
    for counter in counters:
        counter.reset()
    with Omni.from_pipe(pipeline, cache_backend=name, cache_config=settings, defaults=family.settings) as omni:
        alone = omni.generate(prompts[:1], requests[:1], use_tqdm=False)[0]
        assert alone.error is None, alone.error
        assert sum(counter.count for counter in counters) == per_step * alone.computed_steps
        assert alone.computed_steps + alone.skipped_steps == 6
        check_batch(omni, prompts, requests)


# ------------------------------------------------------------------------------------------------------- ends, refusals


def test_abort_and_budget_leave_no_bytes(tiny: Omni) -> None:
    from vllm_omni.diffusion.request import OmniDiffusionRequest

    engine = tiny.engine
    for i, name in enumerate(GATES):
        engine.add_request(OmniDiffusionRequest(name, None, embeds(i), params(asked(name), i)))
    for _ in range(8):
        engine.step()
    assert engine.worker.cache_bytes > 0
    engine.abort(list(GATES))
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.worker.cache_bytes == 0


@pytest.mark.parametrize("name", GATES)
def test_without_room_it_computes(name: str) -> None:
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=6)
    backend = enabled(name, pipeline, memory_budget_mb=0.001)
    assert torch.equal(run_latents(pipeline, num_inference_steps=6), plain)
    assert backend.last_request.skipped_steps == 0 and backend.store.used == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("easycache", {"mag_threshold": 0.1}, "mag_threshold belongs to a plan, easycache decides from data"),
        ("seacache", {"nfe": 5}, "nfe belongs to a plan"),
        ("fbcache", {"steps_mask": [1, 0]}, "steps_mask belongs to a plan"),
        ("fbcache", {"predictor": "gram"}, "predictor must be one of 'reuse', 'linear', 'damped' with fbcache"),
        ("easycache", {"coefficients": [1.0]}, "coefficients is a TeaCache setting"),
        ("easycache", {"rel_l1_thresh": 0}, "rel_l1_thresh should be greater than 0, got 0"),
        ("easycache", {"rel_l1_thresh": float("nan")}, "rel_l1_thresh"),
        ("easycache", {"rel_l1_tresh": 0.1}, "did you mean 'rel_l1_thresh'"),
        ("teacache", {}, "coefficients must be given: none are published for this checkpoint"),
        ("teacache", {"coefficients": []}, "coefficients"),
        ("teacache", {"coefficients": [float("inf")]}, "coefficients"),
    ],
)
def test_bad_settings_are_refused_at_start_up(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniError, match=message):
        Omni.from_pipe(tiny_flux(), cache_backend=name, cache_config=settings)


def test_a_bad_request_ends_alone(tiny: Omni) -> None:
    bad = [{"backend": "teacache"}, {"backend": "easycache", "nfe": 4}, {"backend": "fbcache", "predictor": "affine"}]
    requests = [params(c) for c in (*bad, asked("easycache"))]
    outputs = tiny.generate([embeds(i) for i in range(4)], requests, use_tqdm=False)
    assert all(isinstance(o.error, InvalidValueError) for o in outputs[:3]) and outputs[3].ok


@pytest.mark.parametrize("name", ["tea_cache", "sea_cache", "easy-cache", "FBCache", "mag_cache"])
def test_spellings(name: str) -> None:
    assert isinstance(get_cache_backend(name, {}), CacheBackend)


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'magcache', 'easycache', 'seacache', 'teacache', 'fbcache'.*got 'taecache'"):
        get_cache_backend("taecache", {})


def test_short_threshold_is_the_gates_own(tiny: Omni) -> None:
    cache = {"backend": "fbcache", "threshold": 0.25}
    output = tiny.generate([embeds(0)], [params(cache)], use_tqdm=False)[0]
    assert output.cache_settings == {"backend": "fbcache", "threshold": 0.25, "predictor": "reuse"}


# ------------------------------------------------------------------------------------------------------- single pieces


def test_published_coefficients_have_their_source() -> None:
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


def test_the_filter_passes_what_the_noise_leaves() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    low, high = torch.ones(1, 1, 8, 8), torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert torch.allclose(sea_filter(x, 0.0), x, atol=1e-3)  # without noise all of it, at gain 1
    assert sea_filter(low, 0.9).abs().mean() > 2 * sea_filter(high, 0.9).abs().mean()


def test_config_is_the_one_of_all_backends() -> None:
    backend = get_cache_backend("fbcache", DiffusionCacheConfig(rel_l1_thresh=0.1))
    assert backend is not None and backend.config.rel_l1_thresh == 0.1


# ---------------------------------------------------------------------------------------- the cache-dit package


def test_cache_dit_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.diffusion.cache.cache_dit.find_spec", lambda name: None)
    with pytest.raises(InvalidValueError, match=r"pip install 'vllm-omni-magcache\[cache-dit\]'"):
        get_cache_backend("cache_dit", {})


def test_cache_dit_on_a_plain_pipeline_but_not_in_the_engine() -> None:
    pytest.importorskip("cache_dit")
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=STEPS)
    last = BlockCounter(pipeline.transformer.single_transformer_blocks[-1])
    backend = get_cache_backend("cache_dit", {"rel_l1_thresh": 0.9, "num_inference_steps": STEPS})
    assert backend is not None
    backend.enable(pipeline)
    cached = run_latents(pipeline, num_inference_steps=STEPS)
    assert 0 < last.count < STEPS and not torch.allclose(cached, plain, atol=1e-6)
    backend.disable(pipeline)
    assert torch.allclose(run_latents(pipeline, num_inference_steps=STEPS), plain, atol=1e-6)
    with pytest.raises(InvalidValueError, match="cannot serve requests"):
        Omni.from_pipe(tiny_flux(), cache_backend="cache_dit")


@pytest.mark.parametrize("settings", [{"nfe": 4}, {"predictor": "damped"}, {"memory_budget_mb": 1}])
def test_cache_dit_refuses_what_it_cannot_do(settings: dict[str, Any]) -> None:
    pytest.importorskip("cache_dit")
    with pytest.raises(InvalidValueError):
        get_cache_backend("cache_dit", settings)
