"""AsyncOmni: whatever ends its thread, nobody waits; an id, an abort and a parameter touch their own request alone."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
import pytest_asyncio
import torch
from calls import CACHED, final, within
from closeness import assert_close
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from PIL import Image
from pipelines import embeds, run_latents, tiny_flux

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import EngineDeadError, InvalidValueError, RequestAbortedError
from vllm_omni.outputs import OmniRequestOutput

thread_dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def omni() -> Iterator[Omni]:
    with Omni.from_pipe(tiny_flux(), **CACHED) as engine:
        yield engine


@pytest_asyncio.fixture
async def async_omni() -> AsyncIterator[AsyncOmni]:
    async with AsyncOmni.from_pipe(tiny_flux(), **CACHED) as engine:
        yield engine


@thread_dies
@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
async def test_whatever_ends_the_engines_thread_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    pipeline = tiny_flux()
    before = run_latents(pipeline, num_inference_steps=4)
    omni = AsyncOmni.from_pipe(pipeline, max_num_seqs=2, **CACHED)
    step, steps = omni.engine.step, iter(range(1000))

    def failing() -> list[OmniRequestOutput]:
        if next(steps) == 6:
            raise kind("injected")
        return step()

    monkeypatch.setattr(omni.engine, "step", failing)
    tasks = [asyncio.create_task(final(omni, i, num_inference_steps=500)) for i in range(4)]  # two of them wait
    for error in await within(10, asyncio.gather(*tasks, return_exceptions=True)):
        assert isinstance(error, EngineDeadError) and "injected" in str(error)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="injected"):
            await within(5, final(omni))
    await omni.abort("anything")
    await within(10, asyncio.to_thread(omni.close))
    assert not omni._thread.is_alive()
    assert torch.equal(run_latents(pipeline, num_inference_steps=4), before)  # the cache is off the pipeline again


async def test_a_forgotten_engine_ends_its_thread_and_frees_its_model() -> None:
    omni = AsyncOmni.from_pipe(tiny_flux(), **CACHED)
    assert (await final(omni)).ok
    thread, transformer = omni._thread, weakref.ref(omni.engine.worker.pipeline.transformer)
    del omni
    gc.collect()
    await asyncio.to_thread(thread.join, 5)
    gc.collect()
    assert not thread.is_alive() and transformer() is None


async def test_an_id_in_use_is_refused_and_its_owner_does_not_notice(async_omni: AsyncOmni) -> None:
    """Also if the second one is cancelled before the engine has heard of it."""
    expected = (await final(async_omni, num_inference_steps=60)).latents
    owner = asyncio.create_task(final(async_omni, request_id="same", num_inference_steps=60))
    await asyncio.sleep(0.01)
    with pytest.raises(InvalidValueError, match="request_id must not be in use"):
        await final(async_omni, 1, "same")
    for rounds in range(4):
        second = asyncio.create_task(final(async_omni, 1, "same"))
        for _ in range(rounds):
            await asyncio.sleep(0)
        second.cancel()
        with suppress(asyncio.CancelledError, InvalidValueError):
            await second
    output = await within(30, owner)
    assert output.request_id == "same" and torch.equal(output.latents, expected)


async def test_an_id_is_free_as_soon_as_its_owner_has_left(async_omni: AsyncOmni) -> None:
    expected = (await final(async_omni)).latents
    for _ in range(10):
        async with aclosing(async_omni.generate(embeds(1), Params(num_inference_steps=900), "again")) as stream:
            await anext(stream)
        seen = [o async for o in async_omni.generate(embeds(0), Params(num_inference_steps=8, seed=0), "again")]
        assert seen[-1].ok and {output.request_id for output in seen} == {"again"}
        output = await within(10, final(async_omni, request_id="again"))
        assert torch.equal(output.latents, expected)


@pytest.mark.parametrize("wrong", [5, "", "x" * 257, ("a",), b"b", "a\n\x1b[31m"])
async def test_ids_that_are_none(async_omni: AsyncOmni, wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="request_id"):
        await within(10, final(async_omni, request_id=wrong))
    if not isinstance(wrong, str):
        with pytest.raises(InvalidValueError, match="request_ids"):
            await async_omni.abort([wrong])
    assert (await within(10, final(async_omni))).ok


async def test_an_abort_is_for_its_own_request(async_omni: AsyncOmni) -> None:
    tasks = {
        name: asyncio.create_task(final(async_omni, i, name, num_inference_steps=300)) for i, name in enumerate("ab")
    }
    await asyncio.sleep(0.05)
    await async_omni.abort(["a", "unknown"])
    ended = await within(30, tasks["a"])
    assert isinstance(ended.error, RequestAbortedError) and not tasks["b"].done()
    assert (await within(60, tasks["b"])).ok


async def test_several_event_loops_may_ask(async_omni: AsyncOmni) -> None:
    expected = [(await final(async_omni, i)).latents for i in range(3)]
    elsewhere = [asyncio.to_thread(lambda i=i: asyncio.run(final(async_omni, i))) for i in range(3)]
    for output, alone in zip(await within(30, asyncio.gather(*elsewhere)), expected, strict=True):
        assert_close(output.latents, alone)


def asked() -> tuple[dict[str, Any], Params, Callable[[], None]]:
    """A prompt, parameters, and what a caller may do to them afterwards."""
    sigmas, cache = [1.0, 0.8, 0.6, 0.4, 0.2], {"threshold": 0.24}
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(3))
    prompt = embeds(0)
    params = Params(sigmas=sigmas, cache=cache, latents=noise, output_type="latent")

    def spoil() -> None:
        assert params.sigmas is not None
        for listed in (sigmas, params.sigmas):
            listed[:] = [0.1] * 5
        cache["threshold"] = -5
        noise.zero_()
        for tensor in prompt.values():
            tensor.fill_(7.0)

    return prompt, params, spoil


def test_what_a_caller_changes_after_the_call_changes_no_picture(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, params, spoil = asked()
    (expected,) = omni.generate(prompt, params, use_tqdm=False)
    step = omni.engine.step

    def spoiling() -> list[OmniRequestOutput]:
        spoil()
        return step()

    monkeypatch.setattr(omni.engine, "step", spoiling)
    (output,) = omni.generate(prompt, params, use_tqdm=False)
    assert torch.equal(output.latents, expected.latents) and output.plan == expected.plan


async def test_nor_while_the_engine_runs_elsewhere(async_omni: AsyncOmni) -> None:
    prompt, params, _ = asked()
    (*_, expected) = [output async for output in async_omni.generate(prompt, params)]
    prompt, params, spoil = asked()
    stream = async_omni.generate(prompt, params)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)  # taken, and probably not looked at
    spoil()
    (*_, output) = [await first, *[output async for output in stream]]
    assert torch.equal(output.latents, expected.latents) and output.plan == expected.plan


def test_a_compiled_denoiser_takes_turns_with_the_module_that_it_wraps() -> None:
    pipe = tiny_flux()
    wrapped = FluxPipeline(**pipe.components | {"transformer": torch.compile(pipe.transformer, backend="eager")})
    with Omni.from_pipe(pipe) as inner, Omni.from_pipe(wrapped) as outer:
        assert inner.engine._turns == outer.engine._turns and len(inner.engine._turns) == 1


async def test_engines_over_one_denoiser_take_turns() -> None:
    """Text to image and image to image over the same weights, each in its own thread: caches exchange its blocks."""
    pipe = tiny_flux()
    parts = {n: p for n, p in pipe.components.items() if n not in ("image_encoder", "feature_extractor", "scheduler")}
    other = FluxImg2ImgPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config))
    image = {"multi_modal_data": {"image": Image.new("RGB", (32, 32), "red")}}

    def asked(i: int, more: dict[str, Any]) -> tuple[dict[str, Any], Params]:
        return embeds(i) | more, Params(num_inference_steps=10 + i, seed=i, output_type="latent")

    async def latents(omni: AsyncOmni, i: int, more: dict[str, Any]) -> torch.Tensor:
        *_, output = [output async for output in omni.generate(*asked(i, more))]
        assert output.error is None and output.skipped_steps, output.error
        return output.latents

    wanted = []
    for one, more in ((pipe, {}), (other, image)):
        with Omni.from_pipe(one, **CACHED) as omni:
            prompts, params = zip(*[asked(i, more) for i in range(4)], strict=True)
            wanted += [output.latents for output in omni.generate(prompts, list(params), use_tqdm=False)]
    async with AsyncOmni.from_pipe(pipe, **CACHED) as text, AsyncOmni.from_pipe(other, **CACHED) as edits:
        for _ in range(3):
            both = [(omni, i, more) for omni, more in ((text, {}), (edits, image)) for i in range(4)]
            made = await within(60, asyncio.gather(*[latents(*one) for one in both]))
            for got, alone in zip(made, wanted, strict=True):
                assert_close(got, alone)
