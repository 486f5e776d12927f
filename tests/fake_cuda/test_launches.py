"""Kernels that a step launches: of a computed one as many as plain diffusers', of a skipped one what no block needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, Family

import fake_cuda
from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params

STEPS, SKIPPED = 6, 2
MASK = [1, 1, 0, 1, 0, 1]
NAMES = ("FLUX.1", "Wan 2.1")


def kernels(job: Callable[[], Any]) -> int:
    before = fake_cuda.device.kernels.total()
    job()
    return fake_cuda.device.kernels.total() - before


def plain(family: Family, pipeline: Any, steps: int) -> None:
    prompt = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in family.prompt(0).items()}
    generator = torch.Generator().manual_seed(0)
    given = family.settings | family.guided(3.0) | prompt
    pipeline(**given, num_inference_steps=steps, generator=generator, output_type="latent")


def launched(family: Family, n: int) -> dict[str, float]:
    """Per step of one request, plain; per step that `n` share, computed and skipped."""
    pipeline = family.build().to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    config = {"steps_mask": MASK, "predictor": "linear"}
    with Omni.from_pipe(pipeline, defaults=family.settings, cache_backend="magcache", cache_config=config) as omni:

        def run(steps: int, cache: Any) -> None:
            guided = family.guided(3.0)
            asked = [
                Params(num_inference_steps=steps, seed=i, output_type="latent", cache=cache, **guided) for i in range(n)
            ]
            prompts = [family.prompt(0) for _ in range(n)]  # of one length
            assert not any(output.error for output in omni.generate(prompts, asked, use_tqdm=False))

        run(STEPS, None)
        alone = kernels(lambda: plain(family, pipeline, 2 * STEPS)) - kernels(lambda: plain(family, pipeline, STEPS))
        off = kernels(lambda: run(STEPS, "off"))
        computed = (kernels(lambda: run(2 * STEPS, "off")) - off) / STEPS
        skipped = computed + (kernels(lambda: run(STEPS, None)) - off) / SKIPPED
    return {"plain": alone / STEPS, "computed": computed, "skipped": skipped}


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_launches_no_more_than_it_must(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    one, eight = launched(family, 1), launched(family, 8)
    print(f"{name}: {one} alone, {eight} for eight at once")
    assert one["computed"] <= 1.02 * one["plain"] + 4
    assert one["skipped"] < 0.4 * one["computed"]
    assert eight["computed"] / 8 < 0.3 * one["computed"]  # the pipelines' own steps stay each request's
    assert eight["skipped"] / 8 < 0.6 * one["skipped"]
