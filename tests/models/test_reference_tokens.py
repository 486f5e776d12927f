"""Pipelines whose latents change their shape between two steps: FLUX.2 klein sends its reference tokens once."""

from __future__ import annotations

from typing import Any

import diffusers as d
import pytest
import torch
from closeness import assert_close
from families import FAMILIES
from family import picture
from pipelines import CURVE

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig

KLEIN = next(family for family in FAMILIES if family.name == "FLUX.2 klein")
STEPS = (6, 5, 7)
GREEDY = {"mag_ratios": CURVE, "mag_threshold": 10.0, "mag_retention_ratio": 0.0, "mag_max_skip_steps": 2}
PICTURES = [picture(torch.Generator().manual_seed(0), 64), None, picture(torch.Generator().manual_seed(2), 64)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = d.Flux2KleinKVPipeline(**KLEIN.build().components)
    made.set_progress_bar_config(disable=True)
    return made


def prompt(i: int) -> dict[str, Any]:
    return {"prompt_embeds": KLEIN.prompt(i)["prompt_embeds"]}


def plain(pipe: Any, i: int) -> torch.Tensor:
    call = dict(height=64, width=64, num_inference_steps=STEPS[i], output_type="latent", image=PICTURES[i])
    return pipe(**prompt(i), **call, generator=torch.Generator().manual_seed(i)).images


def served(pipe: Any, **kwargs: Any) -> list[Any]:
    with Omni.from_pipe(pipe, **kwargs) as omni:
        params = [
            Params(num_inference_steps=n, seed=i, output_type="latent", height=64, width=64)
            for i, n in enumerate(STEPS)
        ]
        prompts = [
            prompt(i) | ({} if p is None else {"multi_modal_data": {"image": p}}) for i, p in enumerate(PICTURES)
        ]
        outputs = omni.generate(prompts, params, use_tqdm=False)
    assert all(output.ok for output in outputs), [output.error for output in outputs]
    return outputs


def test_reference_tokens_that_are_sent_once(pipe: Any) -> None:
    for i, output in enumerate(served(pipe)):
        assert_close(output.latents, plain(pipe, i))


def test_a_residual_of_another_shape_is_never_forecast_with(pipe: Any) -> None:
    """The plan has the second step skipped, with what the first one left: that one had the reference tokens too."""
    outputs = served(pipe, cache_backend="magcache", cache_config=GREEDY)
    assert [output.computed_steps + output.skipped_steps for output in outputs] == list(STEPS)
    assert outputs[0].skipped_steps and outputs[1].skipped_steps > 1
    backend = MagCacheBackend(DiffusionCacheConfig(**GREEDY))
    backend.enable(pipe)
    for i, output in enumerate(outputs):
        assert_close(plain(pipe, i), output.latents)
        assert backend.last_request is not None and backend.last_request.skipped_steps == output.skipped_steps
    backend.disable(pipe)


def test_edits_that_begin_together_keep_their_reference_tokens_apart(pipe: Any) -> None:
    """Their first calls are alike in everything, but what comes back beside the latents has no rows to divide."""
    pictures = [picture(torch.Generator().manual_seed(seed), 64) for seed in (3, 4)]
    prompts = [prompt(i) | {"multi_modal_data": {"image": one}} for i, one in enumerate(pictures)]
    size: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "height": 64, "width": 64}
    with Omni.from_pipe(pipe) as omni:
        outputs = omni.generate(prompts, [Params(seed=i, **size) for i in range(2)], use_tqdm=False)
    for i, output in enumerate(outputs):
        assert output.ok, output.error
        alone = pipe(**prompt(i), **size, image=pictures[i], generator=torch.Generator().manual_seed(i)).images
        torch.testing.assert_close(output.latents, alone, rtol=0, atol=1e-5)
