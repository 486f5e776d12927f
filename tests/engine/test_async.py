"""`AsyncOmni`: progress, previews, cancellation, simultaneous requests, and close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from closeness import assert_close
from pipelines import CURVE, DEFAULTS, embeds, tiny_flux

from vllm_omni import AsyncOmni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import EngineClosedError, InvalidValueError, RequestAbortedError
from vllm_omni.outputs import OmniRequestOutput


@pytest_asyncio.fixture
async def omni() -> AsyncIterator[AsyncOmni]:
    async with AsyncOmni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults=DEFAULTS
    ) as engine:
        yield engine


async def final(omni: AsyncOmni, i: int, **params: object) -> OmniRequestOutput:
    last = None
    async for output in omni.generate(embeds(i), Params(seed=i, output_type="latent", **params)):
        last = output
    assert last is not None and last.finished
    return last


async def idle(omni: AsyncOmni) -> None:
    for _ in range(500):
        if not omni.engine.has_unfinished_requests():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine did not become idle")


async def test_progress_comes_before_the_final_output(omni: AsyncOmni) -> None:
    seen = [o async for o in omni.generate(embeds(0), Params(num_inference_steps=12, seed=0), "mine")]
    assert all(o.request_id == "mine" for o in seen)
    assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
    steps = [o.step for o in seen[:-1]]
    assert steps == sorted(steps) and len(set(steps)) > 6
    assert seen[-1].images and seen[-1].skipped_steps > 0


async def test_previews_approach_the_picture(omni: AsyncOmni) -> None:
    params = Params(num_inference_steps=12, seed=0, preview_every=4, num_outputs_per_prompt=2)
    seen = [o async for o in omni.generate(embeds(0), params)]
    plain = [o async for o in omni.generate(embeds(0), params.model_copy(update={"preview_every": None}))][-1]
    previews = [o for o in seen[:-1] if o.images]
    assert [len(o.images) for o in previews] == [2, 2]  # after steps 4 and 8; the twelfth is the picture itself
    away = [
        np.abs(np.asarray(o.images[0], dtype=float) - np.asarray(seen[-1].images[0], dtype=float)).mean()
        for o in previews
    ]
    assert away[0] > away[1] > 0
    assert np.array_equal(np.asarray(seen[-1].images[0]), np.asarray(plain.images[0]))  # looking changes nothing


async def test_simultaneous_requests_equal_their_solo_runs(omni: AsyncOmni) -> None:
    together = await asyncio.gather(*(final(omni, i, num_inference_steps=4 + 3 * i) for i in range(8)))
    for i, output in enumerate(together):
        alone = await final(omni, i, num_inference_steps=4 + 3 * i)
        assert_close(output.latents, alone.latents)
    assert omni.engine.worker.cache_bytes == 0


async def test_cancelling_the_task_aborts_the_request(omni: AsyncOmni) -> None:
    begun = asyncio.Event()

    async def run() -> None:
        async for _ in omni.generate(embeds(0), Params(num_inference_steps=900)):
            begun.set()

    task = asyncio.create_task(run())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(omni)
    assert omni.engine.worker.cache_bytes == 0
    assert (await final(omni, 1, num_inference_steps=4)).ok


async def test_abort_by_id_ends_the_request(omni: AsyncOmni) -> None:
    async for output in omni.generate(embeds(0), Params(num_inference_steps=900), "victim"):
        if not output.finished:
            await omni.abort("victim")
    assert isinstance(output.error, RequestAbortedError)
    await omni.abort("unknown")


async def test_a_refused_request_raises_and_later_ones_are_served(omni: AsyncOmni) -> None:
    with pytest.raises(InvalidValueError, match="strength"):
        await final(omni, 0, strength=0.5)
    with pytest.raises(InvalidValueError, match="cache"):
        await final(omni, 0, cache="fastest")
    with pytest.raises(InvalidValueError, match="prompt"):
        async for _ in omni.generate("  "):
            pass
    assert (await final(omni, 0, num_inference_steps=4)).ok


async def test_close_ends_running_requests() -> None:
    omni = AsyncOmni.from_pipe(tiny_flux(), defaults=DEFAULTS)
    stream = omni.generate(embeds(0), Params(num_inference_steps=900))
    await anext(stream)
    await asyncio.to_thread(omni.close)
    last = None
    async for output in stream:
        last = output
    assert last is not None and isinstance(last.error, RequestAbortedError)
    with pytest.raises(EngineClosedError):
        await final(omni, 0)
