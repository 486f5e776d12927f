"""A request in a batch and the same alone, in bfloat16: what "as made alone" means there, and what it hangs on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, levels_apart

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params

WORDS = ["red apple", "penguin", "guitar", "octopus"]
ROUNDINGS = 4  # of bfloat16, after a whole run; the largest seen is 0.7


@pytest.mark.slow
def test_a_picture_in_a_batch_is_the_one_made_alone_but_for_roundings() -> None:
    with Omni("demo", dtype="bfloat16", cache_backend="magcache") as omni:

        def made(output_type: str, alone: bool) -> list[Any]:
            asked = [Params(num_inference_steps=12, seed=i, output_type=output_type) for i in range(4)]
            if alone:
                return [omni.generate([w], [p], use_tqdm=False)[0] for w, p in zip(WORDS, asked, strict=True)]
            return omni.generate(WORDS, asked, use_tqdm=False)

        for joint, single in zip(made("latent", False), made("latent", True), strict=True):
            assert joint.error is None and single.error is None and joint.skipped_steps > 0
            assert_close(joint.latents.float(), single.latents.float(), roundings=ROUNDINGS * 2**16)  # in float32's
        for joint, single in zip(made("pil", False), made("pil", True), strict=True):
            assert levels_apart(joint.images[0], single.images[0]) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_batches_of_one_size_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    """Kernels choose their order of sums by shape, so that differences come from the size of a batch.

    Some choose it by a row's place as well: at another one, a picture is the same but for roundings.
    """
    with Omni("demo", dtype=str(dtype).removeprefix("torch.")) as omni:
        transformer, seen = omni.engine.worker.pipeline.transformer, []
        handle = transformer.register_forward_pre_hook(lambda m, a, given: seen.append(given), with_kwargs=True)
        asked = [Params(num_inference_steps=1, seed=i, output_type="latent") for i in range(4)]
        omni.generate(WORDS, asked, use_tqdm=False)
        handle.remove()
        (given,) = seen
        joined = {name for name, v in given.items() if isinstance(v, torch.Tensor) and v.ndim and len(v) == 4}

        def rows(order: list[int]) -> np.ndarray:
            with torch.inference_mode():
                named = {name: v[order] if name in joined else v for name, v in given.items()}
                return transformer(**named)[0].float().numpy()

        together, twins, turned = rows([0, 1, 2, 3]), rows([0, 0, 0, 0]), rows([3, 2, 1, 0])
        assert np.array_equal(together[0], twins[0])
        bound = {"roundings": ROUNDINGS * 2**16} if dtype == torch.bfloat16 else {}  # in float32's
        assert_close(together, turned[::-1], **bound)
