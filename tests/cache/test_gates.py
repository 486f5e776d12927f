"""Gates in the engine: every request decides from its own data, in batches of any mixture and for every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import ROUNDINGS, assert_close
from families import FAMILIES, Family
from gating import GATES, STEPS, asked, params
from lanes import lane, one_of_a_kind
from pipelines import BlockCounter, embeds, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.specs import DENOISER_NAMES, DENOISERS
from vllm_omni.errors import InvalidValueError, OmniError

CURVE = [1.0] + [0.97] * 27


@pytest.fixture(scope="module")
def tiny() -> Iterator[Omni]:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults={"height": 32, "width": 32}
    ) as omni:
        yield omni


def check_batch(omni: Omni, prompts: list[Any], requests: list[Params], roundings: float = ROUNDINGS) -> list[Any]:
    together = omni.generate(prompts, requests, use_tqdm=False)
    for prompt, request, mixed in zip(prompts, requests, together, strict=True):
        assert mixed.error is None, mixed.error
        alone = omni.generate([prompt], [request], use_tqdm=False)[0]
        assert_close(mixed.latents, alone.latents, request.cache, roundings=roundings)
        assert mixed.skipped_steps == alone.skipped_steps and mixed.computed_steps == alone.computed_steps
    assert omni.engine.worker.cache_bytes == 0
    return together


@pytest.mark.parametrize("name", GATES)
def test_a_batch_with_one_gate_equals_each_request_alone(tiny: Omni, name: str) -> None:
    steps = (STEPS, 9, 15, STEPS)
    requests = [params(asked(name), i, n, guidance_scale=2.0 + i) for i, n in enumerate(steps)]
    requests.append(params(asked(name, rel_l1_thresh=1e-9), 7))
    outputs = check_batch(tiny, [embeds(i) for i in range(5)], requests)
    assert all(o.skipped_steps > 0 for o in outputs[:4]) and outputs[4].skipped_steps == 0
    assert outputs[0].cache_settings["backend"] == name


def test_gates_budgets_presets_and_off_share_a_batch(tiny: Omni) -> None:
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
def test_several_images_of_one_prompt_share_a_decision(tiny: Omni, name: str) -> None:
    requests = [params(asked(name), 3, num_outputs_per_prompt=3), params(asked(name), 4)]
    outputs = check_batch(tiny, [embeds(0), embeds(1)], requests)
    assert outputs[0].latents.shape[0] == 3 and outputs[0].skipped_steps > 0


def test_a_neighbour_with_large_steps_does_not_change_a_decision(tiny: Omni) -> None:
    """One request jumps so far each step that a mean over the batch would make all compute."""
    for name in GATES:
        calm, wild = params(asked(name), 0), params(asked(name), 1, sigmas=[1.0, 0.05, 0.9, 0.1, 0.8, 0.02], steps=6)
        alone = tiny.generate([embeds(0)], [calm], use_tqdm=False)[0]
        mixed, _ = tiny.generate([embeds(0), embeds(1)], [calm, wild], use_tqdm=False)
        assert mixed.skipped_steps == alone.skipped_steps > 0
        assert_close(mixed.latents, alone.latents, name)


def test_a_batch_reads_its_signals_once_and_planned_requests_never(tiny: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_gate_refuses_a_model_that_it_cannot_measure(family: str, name: str) -> None:
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


PAIRS = [(family, name) for family in GUIDED for name in GATES if (family.name, name) not in BLIND]
TURNS = {family.name: list(GATES)[i % len(GATES)] for i, family in enumerate(filter(one_of_a_kind, GUIDED))}


@pytest.mark.parametrize(
    ("family", "name"),
    lane(PAIRS, lambda pair: TURNS.get(pair[0].name) == pair[1]),
    ids=lambda v: getattr(v, "name", v),
)
def test_both_branches_of_guidance_follow_one_decision(family: Family, name: str) -> None:
    """Both branches keep residuals of their own and follow one decision."""
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
        per_step = sum(counter.rows for counter in counters) // 6
    for counter in counters:
        counter.reset()
    with Omni.from_pipe(pipeline, cache_backend=name, cache_config=settings, defaults=family.settings) as omni:
        alone = omni.generate(prompts[:1], requests[:1], use_tqdm=False)[0]
        assert alone.error is None, alone.error
        assert sum(counter.rows for counter in counters) == per_step * alone.computed_steps
        assert alone.computed_steps + alone.skipped_steps == 6
        check_batch(omni, prompts, requests, family.roundings)


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


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("easycache", {"mag_threshold": 0.1}, "mag_threshold belongs to a plan, easycache decides from data"),
        ("seacache", {"nfe": 5}, "nfe belongs to a plan"),
        ("fbcache", {"steps_mask": [1, 0]}, "steps_mask belongs to a plan"),
        ("fbcache", {"predictor": "affine"}, "predictor must be 'reuse' or 'linear' with fbcache"),
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


def test_a_request_with_bad_gate_settings_fails_alone(tiny: Omni) -> None:
    bad = [{"backend": "teacache"}, {"backend": "easycache", "nfe": 4}, {"backend": "fbcache", "predictor": "affine"}]
    requests = [params(c) for c in (*bad, asked("easycache"))]
    outputs = tiny.generate([embeds(i) for i in range(4)], requests, use_tqdm=False)
    assert all(isinstance(o.error, InvalidValueError) for o in outputs[:3]) and outputs[3].ok


@pytest.mark.parametrize("name", ["tea_cache", "sea_cache", "easy-cache", "FBCache", "mag_cache"])
def test_spellings_of_backend_names(name: str) -> None:
    assert isinstance(get_cache_backend(name, {}), CacheBackend)


def test_an_unknown_backend_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'magcache', 'easycache', 'seacache', 'teacache', 'fbcache'.*got 'taecache'"):
        get_cache_backend("taecache", {})


def test_threshold_means_the_gates_own_threshold(tiny: Omni) -> None:
    cache = {"backend": "fbcache", "threshold": 0.25}
    output = tiny.generate([embeds(0)], [params(cache)], use_tqdm=False)[0]
    assert output.cache_settings == {"backend": "fbcache", "threshold": 0.25, "predictor": "reuse"}


def test_gates_take_the_config_of_all_backends() -> None:
    backend = get_cache_backend("fbcache", DiffusionCacheConfig(rel_l1_thresh=0.1))
    assert backend is not None and backend.config.rel_l1_thresh == 0.1
