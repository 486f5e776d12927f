"""The demo model on two ranks, one guidance branch each: as a server's engine, and in the caller's own process."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from closeness import levels_apart
from process_client import gone, last
from waiting import until

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.wire import Sleep
from vllm_omni.errors import ConflictError, EngineDeadError, InvalidValueError

ARGS: dict[str, Any] = {"model": "demo", "dtype": "float32", "device": "cpu", "cache_backend": "magcache"}
GUIDED: dict[str, Any] = {"num_inference_steps": 8, "negative_prompt": "penguin", "true_cfg_scale": 3.0}


@pytest.mark.slow
def test_a_server_has_ranks_behind_it(demo: Omni) -> None:
    """With the warm-up, text encoders, decoding, previews, a budget in seconds and an unknown seed."""

    async def scenario() -> list[Any]:
        async with ProcessEngineClient(ARGS | {"cfg_parallel_size": 2}) as client:
            with pytest.raises(ConflictError, match="is for one device"):
                await client.control(Sleep(1))
            await last(client, "measured", seed=5, **GUIDED)
            made = [await last(client, "seconds", seed=1, cache={"seconds": 100.0}, **GUIDED)]
            made += await asyncio.gather(
                last(client, "a", seed=2, preview_every=3, **GUIDED),
                last(client, "b", prompt="guitar", seed=3, num_inference_steps=6),
                last(client, "c", seed=None, **GUIDED),
            )
            assert (await client.stats()).restarts == 0
        return made

    seconds, *served = asyncio.run(scenario())
    assert seconds.error is None
    wanted = demo.generate(
        ["red apple", "guitar", "red apple"],
        [
            Params(seed=2, **GUIDED),
            Params(seed=3, num_inference_steps=6),
            Params(seed=served[2].seed, **GUIDED),
        ],
        use_tqdm=False,
    )
    for got, one in zip(served, wanted, strict=True):
        assert got.error is None and levels_apart(got.images[0], one.images[0]) <= 1
        assert (got.computed_steps, got.skipped_steps) == (one.computed_steps, one.skipped_steps)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_callers_engine_and_nothing_else(demo: Omni) -> None:
    with Omni(**ARGS, cfg_parallel_size=2, rank_timeout_s=10.0) as omni:
        params = Params(seed=2, **GUIDED)
        (output,) = omni.generate("red apple", params, use_tqdm=False)
        (wanted,) = demo.generate("red apple", params, use_tqdm=False)
        assert levels_apart(output.images[0], wanted.images[0]) <= 1
        assert omni.engine.turns > 8
        with pytest.raises(InvalidValueError, match="cannot go to every rank"):
            raise omni.generate("red apple", Params(generator=object()), use_tqdm=False)[0].error
        drawn = torch.get_rng_state()
        unguided = Params(num_inference_steps=1, output_type="latent")
        assert omni.generate("red apple", unguided, use_tqdm=False)[0].error is None
        assert torch.equal(torch.get_rng_state(), drawn)  # the other rank has drawn nothing either
        process = omni.engine.group.members[0].process
        process.kill()
        began = time.monotonic()
        (output,) = omni.generate("red apple", params, use_tqdm=False)
        assert isinstance(output.error, EngineDeadError) and time.monotonic() - began < 30.0
    assert gone(process.pid)


@pytest.mark.slow
def test_what_is_made_while_the_group_comes_to_its_end_is_not_returned() -> None:
    """An accelerator's exchange with a rank that has gone is aborted, and leaves any numbers behind."""
    with Omni(**ARGS, cfg_parallel_size=2, rank_timeout_s=10.0) as omni:
        params, group = Params(num_inference_steps=1, seed=2, output_type="latent"), omni.engine.group
        assert omni.generate("red apple", params, use_tqdm=False)[0].latents is not None

        def end(*args: Any) -> None:
            group.members[0].process.kill()
            until(lambda: group._why is not None)

        omni.engine.worker.pipeline.transformer.register_forward_pre_hook(end)
        (output,) = omni.generate("red apple", params, use_tqdm=False)
        assert isinstance(output.error, EngineDeadError) and output.latents is None
