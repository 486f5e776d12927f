"""Every described family on its own architecture: exact without skips, equal in batches, restored by disable."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from closeness import assert_close, assert_differs
from families import FAMILIES, Family
from lanes import lane, one_of_a_kind
from paths import ROOT
from pipelines import Blocks, embeds, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache import forward
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.specs import DENOISERS

MASK = [1, 1, 0, 1, 0, 1]
STEPS = (4, 6, 9, 6)
PARAMS = ("height", "width")


def latents_of(family: Family, pipeline: Any, steps: int = 6) -> torch.Tensor:
    arguments = {**family.settings, **family.prompt(0), **family.guided(3.0), "num_inference_steps": steps}
    output = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(7), output_type="latent")
    return next(iter(output.values())).clone()


def backend_on(pipeline: Any, mask: list[int]) -> MagCacheBackend:
    backend = MagCacheBackend(DiffusionCacheConfig(steps_mask=mask))
    backend.enable(pipeline)
    return backend


@pytest.mark.parametrize("family", lane(FAMILIES, one_of_a_kind), ids=lambda f: f.name)
def test_a_family_is_exact_without_skips_and_follows_its_mask(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = family.build()
    blocks = Blocks(pipeline)
    plain = latents_of(family, pipeline)
    calls = blocks.count // 6
    assert calls >= 1 and torch.isfinite(plain).all()

    backend = backend_on(pipeline, [1] * 6)
    assert torch.equal(latents_of(family, pipeline), plain)
    backend.disable(pipeline)

    backend = backend_on(pipeline, MASK)
    blocks.reset()
    cached = latents_of(family, pipeline)
    if family.steps_aside:
        backend.disable(pipeline)
        assert blocks.count == calls * 6 and backend.store.peak == 0
        assert torch.equal(cached, plain)
        return
    assert blocks.count == calls * sum(MASK)
    assert backend.store.used == 0 and backend.store.peak > 0
    monkeypatch.setattr(forward, "corrected", lambda forecasts, hidden_states: hidden_states)
    identity = latents_of(family, pipeline)
    backend.disable(pipeline)
    assert torch.isfinite(cached).all()
    assert_differs(cached, plain)
    assert_differs(cached, identity)
    assert torch.equal(latents_of(family, pipeline), plain)


@pytest.mark.parametrize("family", lane(FAMILIES, one_of_a_kind), ids=lambda f: f.name)
def test_a_mixed_batch_equals_each_request_alone(family: Family) -> None:
    pipeline = family.build()
    plain = latents_of(family, pipeline)
    params = [
        Params(**{"num_inference_steps": steps, "seed": i, "output_type": "latent", **family.guided(2.0 + i)})
        for i, steps in enumerate(STEPS)
    ]
    prompts = [family.prompt(i) for i in range(len(STEPS))]
    omni = Omni.from_pipe(
        pipeline, cache_backend="magcache", cache_config={"steps_mask": MASK}, defaults=family.settings
    )
    runner = omni.engine.worker.runner
    alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
    apart = sum(runner.forwards.values())
    together = omni.generate(prompts, params, use_tqdm=False)
    if not family.steps_aside:
        assert sum(runner.forwards.values()) - apart < apart  # some forward had more than one request
    for one, mixed in zip(alone, together, strict=True):
        assert one.error is None and mixed.error is None, (one.error, mixed.error)
        assert mixed.skipped_steps == one.skipped_steps and mixed.plan == one.plan
        assert (one.skipped_steps > 0) is not family.steps_aside
        assert_close(mixed.latents, one.latents, roundings=family.roundings)
    assert omni.engine.worker.cache_bytes == 0
    omni.close()
    assert torch.equal(latents_of(family, pipeline), plain)


@pytest.mark.parametrize("name", ["FLUX.1", "Wan 2.1"])
def test_requests_of_different_sizes_share_an_engine(name: str) -> None:
    """Pictures of different sizes, and videos of different lengths, share an engine and never a forward."""
    family = named(name)
    sizes = [{}, {"height": 48}, {"width": 64}, {}] + [{"num_frames": 9}] * ("num_frames" in family.settings)
    params = [
        Params(**{"num_inference_steps": 6, "seed": i, "output_type": "latent", **family.guided(2.0), **size})
        for i, size in enumerate(sizes)
    ]
    check_mixed(family, family.build(), params)


@pytest.mark.slow
def test_guidance_may_end_before_the_last_step() -> None:
    """A guider stops after half of the steps: the other branch is no longer called, and the plan holds."""
    from diffusers.guiders import ClassifierFreeGuidance

    family = named("HunyuanVideo-1.5")
    pipeline = family.build()
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=3.0, start=0.0, stop=0.5)
    blocks = Blocks(pipeline)
    latents_of(family, pipeline)
    guided = blocks.count - 6
    assert 0 < guided < 6
    backend = backend_on(pipeline, MASK)
    blocks.reset()
    latents_of(family, pipeline)
    assert blocks.count == sum(MASK) + sum(MASK[:guided]) and backend.store.used == 0
    backend.disable(pipeline)
    params = [Params(num_inference_steps=steps, seed=i, output_type="latent") for i, steps in enumerate(STEPS)]
    check_mixed(family, pipeline, params)


def test_a_schedule_of_few_steps_is_computed_in_full(caplog: pytest.LogCaptureFixture) -> None:
    """As FLUX.1-schnell runs: the plan computes all, says so once, and no residual is ever taken."""
    family, pipeline = named("FLUX.1"), tiny_flux()
    plain = latents_of(family, pipeline, 4)
    engine = {"cache_config": {"mag_ratios": [1.0, 1.3, 1.3, 1.3], "mag_threshold": 0.12}, "join_guidance": False}
    with (
        caplog.at_level("INFO", "vllm_omni"),
        Omni.from_pipe(pipeline, cache_backend="magcache", defaults=family.settings, **engine) as omni,
    ):
        params = Params(num_inference_steps=4, seed=7, output_type="latent", **family.guided(3.0))
        outputs = [omni.generate(family.prompt(0), params, use_tqdm=False)[0] for _ in range(3)]
        backend = omni.engine.worker._backends["magcache"]
        assert backend.store.peak == 0
    assert caplog.text.count("nothing to gain in 4 steps") == 1
    for output in outputs:
        assert output.skipped_steps == 0 and torch.equal(output.latents, plain)


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def check_mixed(family: Family, pipeline: Any, params: list[Params]) -> None:
    """Each request of a batch skips what it skips alone, and has the same latents."""
    prompts = [family.prompt(i) for i in range(len(params))]
    with Omni.from_pipe(
        pipeline, cache_backend="magcache", cache_config={"steps_mask": MASK}, defaults=family.settings
    ) as omni:
        alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
        together = omni.generate(prompts, params, use_tqdm=False)
        for one, mixed in zip(alone, together, strict=True):
            assert one.error is None and mixed.error is None, (one.error, mixed.error)
            assert mixed.skipped_steps == one.skipped_steps > 0
            assert mixed.latents.shape == one.latents.shape
            assert_close(mixed.latents, one.latents)
        assert omni.engine.worker.cache_bytes == 0


def test_a_class_without_an_entry_is_cached_and_batched_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategyRegistry

    monkeypatch.delitem(DENOISERS, "FluxTransformer2DModel")
    monkeypatch.delitem(MagCacheStrategyRegistry._strategies, "FluxTransformer2DModel")
    family, pipeline = FAMILIES[0], tiny_flux()
    plain = pipeline(
        **embeds(0), **family.settings, num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
    ).images  # fmt: skip
    params = [Params(num_inference_steps=4 + i, seed=3, output_type="latent") for i in range(2)]
    with caplog.at_level("INFO", "vllm_omni"), Omni.from_pipe(pipeline, defaults=family.settings) as omni:
        outputs = omni.generate([embeds(0), embeds(1)], params, use_tqdm=False)
        assert_close(outputs[0].latents, plain)
        assert omni.engine.worker.runner.forwards["computed"] < 9  # some were shared
    assert caplog.text.count("FluxTransformer2DModel was found to be cached, in batches") == 1
    check_mixed(family, pipeline, [Params(num_inference_steps=6, seed=i, output_type="latent") for i in range(2)])


@pytest.mark.slow
def test_the_table_of_models_is_up_to_date() -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / "models_table.py"), "--check"], cwd=ROOT, check=True)


def test_embeddings_stand_for_a_text_and_for_its_default() -> None:
    """PixArt's default is the empty negative prompt, which it refuses beside negative embeddings."""
    family = next(f for f in FAMILIES if f.name == "PixArt-Σ")
    pipeline = family.build()
    wanted = latents_of(family, pipeline, 3)
    given = family.prompt(0) | family.guided(3.0)
    scale = given.pop("guidance_scale")
    settings = {name: value for name, value in family.settings.items() if name not in ("negative_prompt", *PARAMS)}
    params = {name: value for name, value in family.settings.items() if name in PARAMS} | {"guidance_scale": scale}
    with Omni.from_pipe(pipeline) as omni:
        for empty in ({}, {"prompt": "", "negative_prompt": ""}):
            asked = Params(**params, num_inference_steps=3, seed=7, output_type="latent", extra_args=settings)
            (output,) = omni.generate([given | empty], asked, use_tqdm=False)
            assert output.error is None and torch.equal(output.latents, wanted)
