"""Interrupts, threads and forks of those who call the engine: nothing of an ended call is left for the next one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
import torch
from calls import CACHED, final, latents
from diffusers import FluxPipeline
from greenlet import GreenletExit
from pipelines import DEFAULTS, embeds, tiny_flux
from stepping import add, drain
from waiting import until

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import EngineClosedError, OmniError, UnknownKeyError
from vllm_omni.outputs import OmniRequestOutput


@pytest.fixture
def omni() -> Iterator[Omni]:
    with Omni.from_pipe(tiny_flux(), **CACHED) as engine:
        yield engine


@pytest_asyncio.fixture
async def async_omni() -> AsyncIterator[AsyncOmni]:
    async with AsyncOmni.from_pipe(tiny_flux(), **CACHED) as engine:
        yield engine


def untouched(omni: Omni, expected: torch.Tensor) -> None:
    """The next call works, and nothing of an earlier one is left."""
    assert torch.equal(latents(omni), expected)
    assert omni.engine.worker.cache_bytes == 0 and not omni.engine.has_unfinished_requests()


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
            params = [Params(num_inference_steps=400, seed=round_, cache=cache) for cache in caches]
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
    until(omni.engine.has_unfinished_requests, pause_s=0.001)
    omni.close()
    thread.join(60)
    assert raised and not thread.is_alive()
    with pytest.raises(EngineClosedError):
        latents(omni)


def test_a_signal_handler_may_close_the_engine_and_may_not_call_it(omni: Omni) -> None:
    nested: list[BaseException] = []

    def handler(number: int, frame: Any) -> None:
        with pytest.raises(OmniError, match="called inside") as refused:
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


class Machinery(FluxPipeline):
    """Raises, in its third step, what its own machinery may raise: no `Exception`."""

    raises: BaseException = GeneratorExit()

    def __call__(self, *args: Any, num_inference_steps: int = 4, **kwargs: Any) -> Any:
        def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 2 and num_inference_steps == 5:
                raise self.raises
            return tensors

        more = {"num_inference_steps": num_inference_steps, "callback_on_step_end": ended}
        return super().__call__(*args, **kwargs | more)


@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, GreenletExit])
def test_what_ends_coroutines_ends_one_request_alone(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machinery, "raises", kind("of the pipeline's own"))
    pipe = tiny_flux()
    pipe.__class__ = Machinery
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        params = [Params(num_inference_steps=n, seed=n, output_type="latent") for n in (4, 5, 6)]
        outputs = omni.generate([embeds(i) for i in range(3)], params, use_tqdm=False)
        assert [output.ok for output in outputs] == [True, False, True]
        assert kind.__name__ in str(outputs[1].error)
        assert omni.generate(embeds(0), params[0], use_tqdm=False)[0].ok


class Stubborn(FluxPipeline):
    """Makes each of its runs again, whatever has gone wrong."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super().__call__(*args, **kwargs)
            except Exception:
                continue


def test_a_pipeline_that_would_never_give_up_is_ended() -> None:
    pipe = tiny_flux()
    pipe.__class__ = Stubborn
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        few = Params(num_inference_steps=3, output_type="latent")
        add(omni, "stubborn", embeds(0), few)
        omni.engine.step()
        omni.engine.abort(["stubborn"])
        assert not drain(omni, {})["stubborn"].ok
        assert omni.generate(embeds(0), few, use_tqdm=False)[0].ok
