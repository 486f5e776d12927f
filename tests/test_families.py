"""Every described family on its own architecture: exact where nothing skips, and as planned, apart and clean where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from pipelines import BlockCounter, embeds, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache import standalone
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoisers import DENOISERS
from vllm_omni.errors import InvalidValueError

ROOT = Path(__file__).resolve().parent.parent
MASK = [1, 1, 0, 1, 0, 1]
STEPS = (4, 6, 9, 6)


def latents_of(family: Family, pipeline: Any, steps: int = 6) -> torch.Tensor:
    arguments = {**family.settings, **family.prompt(0), family.guidance: 3.0, "num_inference_steps": steps}
    output = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(7), output_type="latent")
    return next(iter(output.values())).clone()


def backend_on(pipeline: Any, mask: list[int]) -> MagCacheBackend:
    backend = MagCacheBackend(DiffusionCacheConfig(steps_mask=mask))
    backend.enable(pipeline)
    return backend


def first_block(pipeline: Any) -> torch.nn.Module:
    spec = DENOISERS[type(pipeline.transformer).__name__]
    return pipeline.transformer.get_submodule(spec.stack[0].name)[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_on_a_plain_pipeline(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = family.build()
    blocks = BlockCounter(first_block(pipeline))
    plain = latents_of(family, pipeline)
    calls = blocks.count // 6
    assert calls >= 1 and torch.isfinite(plain).all()

    backend = backend_on(pipeline, [1] * 6)
    assert torch.equal(latents_of(family, pipeline), plain)
    backend.disable(pipeline)

    backend = backend_on(pipeline, MASK)
    blocks.reset()
    cached = latents_of(family, pipeline)
    assert blocks.count == calls * sum(MASK)
    assert backend.store.used == 0 and backend.store.peak > 0
    monkeypatch.setattr(standalone, "correction", lambda forecasts, hidden_states: hidden_states)
    identity = latents_of(family, pipeline)
    backend.disable(pipeline)
    assert torch.isfinite(cached).all()
    assert not torch.allclose(cached, plain, atol=1e-6)
    assert not torch.allclose(cached, identity, atol=1e-6)
    assert torch.equal(latents_of(family, pipeline), plain)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_mixed_batch_equals_each_request_alone(family: Family) -> None:
    pipeline = family.build()
    plain = latents_of(family, pipeline)
    params = [
        Params(**{"num_inference_steps": steps, "seed": i, "output_type": "latent", family.guidance: 2.0 + i})
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
    assert sum(runner.forwards.values()) - apart < apart  # some forward had more than one request
    for one, mixed in zip(alone, together, strict=True):
        assert one.error is None and mixed.error is None, (one.error, mixed.error)
        assert mixed.skipped_steps == one.skipped_steps > 0 and mixed.plan == one.plan
        assert (mixed.latents - one.latents).abs().max() < 1e-4
    assert omni.engine.worker.cache_bytes == 0
    omni.close()
    assert torch.equal(latents_of(family, pipeline), plain)


def test_a_class_without_an_entry_is_served_uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.diffusion.cache.magcache.strategy import MagCacheStrategyRegistry

    monkeypatch.delitem(DENOISERS, "FluxTransformer2DModel")
    monkeypatch.delitem(MagCacheStrategyRegistry._strategies, "FluxTransformer2DModel")
    family, pipeline = FAMILIES[0], tiny_flux()
    plain = pipeline(
        **embeds(0), **family.settings, num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
    ).images  # fmt: skip
    params = [Params(num_inference_steps=4 + i, seed=3, output_type="latent") for i in range(2)]
    with Omni.from_pipe(pipeline, defaults=family.settings) as omni:
        outputs = omni.generate([embeds(0), embeds(1)], params, use_tqdm=False)
        assert torch.equal(outputs[0].latents, plain) and outputs[1].ok
    with pytest.raises(InvalidValueError, match="does not know the blocks of FluxPipeline"):
        Omni.from_pipe(pipeline, cache_backend="magcache", cache_config={"steps_mask": MASK})


def test_the_table_of_models_is_in_step() -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / "models_table.py"), "--check"], cwd=ROOT, check=True)
