"""Accidents of the caller's and of the engine's: interrupts, threads, forks, a step that fails, ids used twice."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import random
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image
from pipelines import DEFAULTS, embeds, run_latents, tiny_flux

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy
from vllm_omni.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidValueError,
    ModelLoadError,
    NumericalError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    UnknownKeyError,
)
from vllm_omni.outputs import OmniRequestOutput

CACHED: dict[str, Any] = {
    "cache_backend": "magcache",
    "cache_config": {"mag_ratios": FluxMagCacheStrategy.FLUX_MAG_RATIOS},
    "defaults": DEFAULTS,
}
thread_dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def omni() -> Iterator[Omni]:
    with Omni.from_pipe(tiny_flux(), **CACHED) as engine:
        yield engine


@pytest_asyncio.fixture
async def async_omni() -> AsyncIterator[AsyncOmni]:
    async with AsyncOmni.from_pipe(tiny_flux(), **CACHED) as engine:
        yield engine


def latents(omni: Omni, i: int = 0, steps: int = 8) -> torch.Tensor:
    (output,) = omni.generate(
        embeds(i), Params(num_inference_steps=steps, seed=i, output_type="latent"), use_tqdm=False
    )
    assert output.ok, output.error
    return output.latents


def untouched(omni: Omni, expected: torch.Tensor) -> None:
    """The next call works, and nothing of an earlier one is left."""
    assert torch.equal(latents(omni), expected)
    assert omni.engine.worker.cache_bytes == 0 and not omni.engine.has_unfinished_requests()


async def final(omni: AsyncOmni, i: int = 0, request_id: str | None = None, **given: Any) -> OmniRequestOutput:
    params = Params(**{"num_inference_steps": 8, "seed": i, "output_type": "latent"} | given)
    return [output async for output in omni.generate(embeds(i), params, request_id)][-1]


def within(seconds: float, awaitable: Any) -> Any:
    return asyncio.wait_for(awaitable, seconds)


# ------------------------------------------------------------------------------------------------------- interrupts


@pytest.fixture
def default_sigint() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_control_c_at_any_moment_ends_the_call_and_the_next_one_works(omni: Omni, default_sigint: None) -> None:
    expected, dice, interrupted = latents(omni), random.Random(0), 0
    for round_ in range(12):
        timer = threading.Timer(dice.uniform(0.001, 0.2), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        caches = [None, "off", {"backend": "fbcache"}]
        try:
            params = [Params(num_inference_steps=90, seed=round_, cache=cache) for cache in caches]
            omni.generate([embeds(i) for i in range(3)], params, use_tqdm=False)
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
        with suppress(KeyboardInterrupt):  # a signal that came after the call's end
            timer.join()
            time.sleep(0.01)
        untouched(omni, expected)
    assert interrupted >= 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def in_the_third_forward(omni: Omni, act: Callable[[], Any]) -> Any:
    """Let something happen in the middle of a step."""
    calls = iter(range(1000))

    def hook(module: torch.nn.Module, args: Any) -> None:
        if next(calls) == 2:
            act()

    return omni.engine.worker.pipeline.transformer.norm_out.register_forward_pre_hook(hook)


def test_one_control_c_waits_for_the_end_of_the_step_and_a_second_one_does_not(
    omni: Omni, default_sigint: None
) -> None:
    expected, after = latents(omni), []

    def press(times: int) -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        after.append(times)

    for times in (1, 2):
        handle = in_the_third_forward(omni, lambda times=times: press(times))
        with pytest.raises(KeyboardInterrupt):
            omni.generate(embeds(1), Params(num_inference_steps=50), use_tqdm=False)
        handle.remove()
        untouched(omni, expected)
    assert after == [1]


def test_the_callers_own_handler_is_called_between_steps(omni: Omni) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        handle = in_the_third_forward(omni, lambda: signal.raise_signal(signal.SIGINT))
        assert torch.equal(latents(omni, 1, 12), latents(omni, 1, 12))
        handle.remove()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


@pytest.mark.parametrize("kind", [MemoryError, TimeoutError, KeyboardInterrupt, SystemExit])
def test_whatever_leaves_the_loop_leaves_nothing_behind(
    omni: Omni, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """From between two steps, with one request ended and not taken, and from the middle of a forward."""
    expected, step, steps = latents(omni), omni.engine.step, iter(range(1000))

    def failing() -> list[OmniRequestOutput]:
        ended = step()
        if next(steps) == 8:
            omni.engine._ended.extend(ended)
            raise kind("injected")
        return ended

    monkeypatch.setattr(omni.engine, "step", failing)
    with pytest.raises(kind):
        params = [Params(num_inference_steps=n) for n in (2, 50, 4)]
        omni.generate([embeds(i) for i in range(3)], params, use_tqdm=False)
    monkeypatch.undo()
    untouched(omni, expected)
    if issubclass(kind, Exception):
        return  # an exception of the model ends the request, as every test of a fault shows

    def stop() -> None:
        raise kind("injected")

    handle = in_the_third_forward(omni, stop)
    with pytest.raises(kind):
        omni.generate([embeds(i) for i in range(3)], Params(num_inference_steps=50), use_tqdm=False)
    handle.remove()
    untouched(omni, expected)


def test_parameters_of_the_wrong_kind_cost_their_own_prompt(omni: Omni) -> None:
    expected = latents(omni)
    good = {"num_inference_steps": 8, "seed": 0, "output_type": "latent"}
    one, other = omni.generate([embeds(0), embeds(0)], [good, {1: 2}], use_tqdm=False)
    assert torch.equal(one.latents, expected) and isinstance(other.error, UnknownKeyError)
    untouched(omni, expected)


# ----------------------------------------------------------------------------------------------- threads and processes


def test_threads_take_turns(omni: Omni) -> None:
    expected = [latents(omni, i) for i in range(4)]
    got: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: latents(omni, i)}), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(got[i], expected[i]) for i in range(4))


def test_close_from_another_thread_ends_the_call_that_runs(omni: Omni) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            omni.generate(embeds(0), Params(num_inference_steps=1000), use_tqdm=False)
        except EngineClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not omni.engine.has_unfinished_requests():
        time.sleep(0.001)
    omni.close()
    thread.join(5)
    assert raised and not thread.is_alive()
    with pytest.raises(EngineClosedError):
        latents(omni)


def test_a_signal_handler_may_close_the_engine_and_may_not_call_it(omni: Omni) -> None:
    nested: list[BaseException] = []

    def handler(number: int, frame: Any) -> None:
        with pytest.raises(OmniError, match="inside itself") as refused:
            latents(omni)
        nested.append(refused.value)
        omni.close()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        handle = in_the_third_forward(omni, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(EngineClosedError):
            latents(omni)
        handle.remove()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert nested and not omni.engine.has_unfinished_requests()


def in_a_forked_child(job: Callable[[], Any]) -> str:
    """What the job raises, or "done"."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            job()
            told = "done"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read) as pipe:
            return pipe.read()
    finally:
        os.waitpid(pid, 0)


async def test_a_forked_child_is_told_so_and_its_parent_goes_on(omni: Omni, async_omni: AsyncOmni) -> None:
    expected, forked = latents(omni), f"EngineDeadError: the engine belongs to process {os.getpid()}"
    assert torch.equal((await final(async_omni)).latents, expected)

    def ask() -> None:
        asyncio.events._set_running_loop(None)  # the child's copy of the loop that forked it
        asyncio.run(final(async_omni))

    assert in_a_forked_child(lambda: latents(omni)).startswith(forked)
    assert in_a_forked_child(ask).startswith(forked)
    assert in_a_forked_child(omni.close) == in_a_forked_child(async_omni.close) == "done"
    untouched(omni, expected)
    assert torch.equal((await final(async_omni)).latents, expected)


# ------------------------------------------------------------------------------------------------- the engine's thread


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
        assert (output.latents - alone).abs().max() <= 1e-5 * alone.abs().max()


# ----------------------------------------------------------------------------------------------------- what was taken


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


# -------------------------------------------------------------------------------------------------- copies and pickles


def copies(value: Any) -> list[Any]:
    return [copy.copy(value), copy.deepcopy(value), *(pickle.loads(pickle.dumps(value, n)) for n in (2, 4, 5))]


@pytest.mark.parametrize(
    "error",
    [
        InvalidValueError("height", 63, "must be a multiple of 8"),
        InvalidValueError("generator", lambda: None, "cannot be sent"),
        InvalidValueError("sigmas", [1.0] * 10**6, "must be fewer"),
        InvalidValueError("seed", 10**5000, "must be smaller"),
        UnknownKeyError("cache", "treshold", ["threshold", "preset"]),
        QueueFullError(3, 7.5),
        EngineDeadError("gone", retry_after_s=2.0),
        EngineClosedError("closed"),
        ModelLoadError("no such folder"),
        NumericalError(),
        RequestAbortedError("by its owner"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_copy_and_pickle_with_all_they_say(error: OmniError) -> None:
    for other in copies(error):
        assert type(other) is type(error) and str(other) == str(error) and vars(other) == vars(error)
    assert len(pickle.dumps(error)) < 1000  # nothing large stays with an error


class Strange(Exception):
    """Of somebody else: it can neither be copied nor be pickled."""

    def __init__(self, code: int, where: Any) -> None:
        self.where = where
        super().__init__(f"code {code}")


@pytest.mark.parametrize("error", [None, ValueError("plain"), NumericalError(), Strange(5, lambda: None)])
def test_outputs_copy_and_pickle(error: Exception | None) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    output = OmniRequestOutput("a", "red apple", [picture], latents=torch.ones(2), error=error, plan=(True, False))
    for other in copies(output):
        assert other.images[0].tobytes() == picture.tobytes() and torch.equal(other.latents, output.latents)
        assert (other.request_id, other.prompt, other.plan) == ("a", "red apple", (True, False))
        if isinstance(error, Strange):
            assert type(other.error) is OmniError and str(other.error) == "Strange: code 5"
        else:
            assert type(other.error) is type(error) and str(other.error) == str(error)


def test_an_error_shows_at_most_a_line_of_what_was_wrong() -> None:
    for value in ("x" * 10**7, list(range(10**6)), {i: "x" * 1000 for i in range(1000)}, 10**5000, [10**5000]):
        error = InvalidValueError("field", value, "must be short")
        assert len(str(error)) < 200 and len(str(error.value)) <= 120
    assert InvalidValueError("field", "short", "must be long").value == "short"
