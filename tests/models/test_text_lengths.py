"""Prompts of every length in one batch: a request equals itself alone, and where the model can, they share forwards."""

from __future__ import annotations

from typing import Any

import pytest
from closeness import assert_close
from diffusers.models.attention_dispatch import attention_backend
from families import FAMILIES, Family
from family import of_length
from lanes import lane, one_of_a_kind
from test_families import MASK, STEPS

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params

LENGTHS = (8, 3, 6, 5)
PADDED_BY_NOBODY = [family for family in FAMILIES if not family.fixed_length]


@pytest.mark.parametrize("family", lane(PADDED_BY_NOBODY, one_of_a_kind), ids=lambda f: f.name)
def test_prompts_of_different_lengths_equal_each_alone(family: Family) -> None:
    apart_by = 2 if family.name.startswith("Qwen") else 0  # other pipelines want both prompts to be of one length
    prompts = [of_length(family, i, length, length - apart_by) for i, length in enumerate(LENGTHS)]
    params = [
        Params(**{"num_inference_steps": steps, "seed": i, "output_type": "latent", **family.guided(2.0 + i)})
        for i, steps in enumerate(STEPS)
    ]
    config = {"steps_mask": MASK}
    defaults = family.settings | ({"height": 128, "width": 128} if family.name == "Qwen-Image" else {})
    with Omni.from_pipe(family.build(), cache_backend="magcache", cache_config=config, defaults=defaults) as omni:
        runner = omni.engine.worker.runner
        alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
        apart = sum(runner.forwards.values())
        together = omni.generate(prompts, params, use_tqdm=False)
        if family.name in ("Qwen-Image", "Z-Image"):
            assert sum(runner.forwards.values()) - apart <= 0.6 * apart
        for one, mixed in zip(alone, together, strict=True):
            assert one.error is None and mixed.error is None, (one.error, mixed.error)
            assert mixed.plan == one.plan
            assert_close(mixed.latents, one.latents, roundings=family.roundings)
        assert omni.engine.worker.cache_bytes == 0


def test_texts_are_padded_only_where_the_attention_kernel_leaves_out_what_a_mask_says() -> None:
    """Other kernels refuse a mask, or read from it how many keys there are: a batch would fail, or be wrong."""
    family = next(family for family in FAMILIES if family.name == "Qwen-Image")
    prompts = [of_length(family, i, length, length - 2) for i, length in enumerate(LENGTHS[:2])]
    params = [Params(num_inference_steps=3, seed=i, output_type="latent", **family.guided(2.0)) for i in range(2)]
    masks: list[Any] = []
    with attention_backend("_native_flash"):
        pipeline = family.build()
        pipeline.transformer.register_forward_pre_hook(
            lambda _, args, given: masks.append(given.get("encoder_hidden_states_mask")), with_kwargs=True
        )
        with Omni.from_pipe(pipeline, defaults=family.settings | {"height": 128, "width": 128}) as omni:
            alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
            together = omni.generate(prompts, params, use_tqdm=False)
    assert masks and all(mask is None for mask in masks)
    for one, mixed in zip(alone, together, strict=True):
        assert one.error is None and mixed.error is None, (one.error, mixed.error)
        assert_close(mixed.latents, one.latents, roundings=family.roundings)


def test_several_pictures_of_a_prompt_share_forwards_though_their_sizes_are_said_once() -> None:
    family = next(family for family in FAMILIES if family.name == "Qwen-Image")
    prompts = [family.prompt(i) for i in range(2)]
    asked = {"num_inference_steps": 3, "output_type": "latent", "num_outputs_per_prompt": 2, **family.guided(1.0)}
    params = [Params(seed=i, **asked) for i in range(2)]
    with Omni.from_pipe(family.build(), defaults=family.settings) as omni:
        runner = omni.engine.worker.runner
        alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
        apart = sum(runner.forwards.values())
        together = omni.generate(prompts, params, use_tqdm=False)
        assert sum(runner.forwards.values()) - apart == apart / 2
    for one, mixed in zip(alone, together, strict=True):
        assert one.error is None and mixed.error is None, (one.error, mixed.error)
        assert_close(mixed.latents, one.latents, roundings=family.roundings)
