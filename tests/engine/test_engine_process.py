"""The engine in a process of its own, seen from its client: pictures, statistics, errors, the queue and deadlines."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from allocating import counted, faults
from closeness import levels_apart
from paths import ROOT
from PIL import Image
from process_client import ARGS, idle, last, page_faults, until

from vllm_omni import Omni
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.wire import HEADER, Abort, encode
from vllm_omni.errors import (
    DeadlineExceededError,
    EngineDrainingError,
    InvalidValueError,
    NumericalError,
    OmniError,
    QueueFullError,
    RefusedError,
    RequestAbortedError,
    UnknownKeyError,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[ProcessEngineClient]:
    async with ProcessEngineClient(ARGS, max_queued_requests=4) as running:
        yield running
        process = running._engine.process
    assert process.poll() is not None


@one_loop
async def test_pictures_equal_those_of_the_offline_engine(client: ProcessEngineClient) -> None:
    wanted: list[dict[str, Any]] = [
        {"seed": 1, "num_inference_steps": 6},
        {"seed": 2, "num_inference_steps": 9, "cache": "off", "guidance_scale": 2.0},
        {"seed": 3, "num_inference_steps": 12, "cache": {"speedup": 2.0}, "height": 96},
        {"seed": 4, "num_inference_steps": 8, "cache": "fast", "num_outputs_per_prompt": 2},
    ]
    given = await asyncio.gather(*(last(client, f"same-{i}", **params) for i, params in enumerate(wanted)))
    with Omni(**ARGS) as omni:
        for params, output in zip(wanted, given, strict=True):
            (alone,) = omni.generate("red apple", params, use_tqdm=False)
            assert output.ok and output.plan == alone.plan and output.seed == params["seed"]
            for one, other in zip(output.images, alone.images, strict=True):
                assert levels_apart(one, other) <= 1


@one_loop
async def test_the_client_imports_no_torch() -> None:
    code = "import sys, vllm_omni.engine.client; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "set()"


@one_loop
async def test_info_describes_the_loaded_model(client: ProcessEngineClient) -> None:
    info = client.info
    assert (info.name, info.pipeline, info.size_multiple, info.previews) == ("demo", "FluxPipeline", 8, True)
    assert info.denoisers == {"transformer": "FluxTransformer2DModel"} and not info.pictures
    assert info.defaults["num_inference_steps"] == 28 and info.defaults["height"] == 64
    assert info.tokens_per_pixel == 64 / 64**2 and "guidance_scale" in info.parameters
    assert info.cache["backend"] == "magcache" and "fast" in info.cache["presets"]
    assert info.cache["profiles"] == ["demo", "demo-50"]


@one_loop
async def test_progress_and_previews(client: ProcessEngineClient) -> None:
    params = Params(seed=0, num_inference_steps=24, preview_every=8, cache="off")
    outputs = [o async for o in client.generate("red apple", params, "seen")]
    assert [len(o.images) for o in outputs if o.images] == [1, 1, 1]
    assert [o.step for o in outputs] == sorted(o.step for o in outputs) and outputs[-1].computed_steps == 24
    assert all(o.num_inference_steps == 24 and o.prompt == "red apple" for o in outputs)


@one_loop
async def test_stats_count_steps_and_requests(client: ProcessEngineClient) -> None:
    await idle(client)
    before = await client.stats()
    output = await last(client, "counted", num_inference_steps=20)
    await idle(client)
    after = await client.stats()
    assert after.requests["finished"] == before.requests["finished"] + 1
    assert after.steps_computed - before.steps_computed == output.computed_steps > 0
    assert after.steps_skipped - before.steps_skipped == output.skipped_steps > 0
    assert after.forwards_computed - before.forwards_computed == output.computed_steps
    assert after.batch_sizes[1] - before.batch_sizes.get(1, 0) == 20
    assert after.decode_s > before.decode_s and after.denoise_s > before.denoise_s
    assert after.recent[-1]["computed_steps"] == output.computed_steps and "prompt" not in after.recent[-1]
    assert "apple" not in str(after)
    await client.check_health()


@one_loop
@pytest.mark.alone
@counted
async def test_a_forward_of_the_engine_finds_the_memory_of_the_last_one(client: ProcessEngineClient) -> None:
    assert client._engine is not None
    counts = []
    for turn in range(5):
        before = page_faults(client._engine.process.pid)
        await asyncio.gather(*(last(client, f"{turn}-{i}", num_inference_steps=6) for i in range(8)))
        counts.append(page_faults(client._engine.process.pid) - before)
    theirs = await asyncio.to_thread(faults, "a user's", ARGS, 8, 6)
    assert min(counts) < theirs / 4, (counts, theirs)


@one_loop
async def test_errors_keep_their_class_and_text(client: ProcessEngineClient) -> None:
    with pytest.raises(InvalidValueError, match=r"height must be a multiple of 8 \(nearest: 64\)") as refused:
        await last(client, "bad", height=63)
    assert refused.value.field == "height" and refused.value.value == 63
    with pytest.raises(UnknownKeyError, match="did you mean 'threshold'"):
        await last(client, "bad", cache={"treshold": 0.1})
    with pytest.raises(InvalidValueError, match="prompt"):
        await last(client, "bad", prompt=" ")
    with pytest.raises(InvalidValueError, match="priority"):
        await last(client, "bad", priority=2**40)
    with pytest.raises(InvalidValueError, match="timeout_s"):
        await last(client, "bad", timeout_s=float("nan"))
    with pytest.raises(InvalidValueError, match="generator"):
        await last(client, "bad", generator=torch.Generator())
    with pytest.raises(InvalidValueError, match="plain values"):
        await last(client, "bad", extra_args={"joint_attention_kwargs": object()})
    assert (await last(client, "good", num_inference_steps=2)).ok


@one_loop
async def test_a_fault_of_one_request_fails_only_that_one(client: ProcessEngineClient) -> None:
    """A wrong shape in the denoiser, a wrong length before it: neighbours in the batch do not notice."""
    wrong = {"prompt_embeds": torch.zeros(1, 4, 7), "pooled_prompt_embeds": torch.zeros(1, 128)}
    good = [last(client, f"good-{i}", num_inference_steps=10) for i in range(2)]
    embeds, encode_error, *rest = await asyncio.gather(
        last(client, "wrong", prompt=wrong, num_inference_steps=10),
        last(client, "early", num_inference_steps=10, max_sequence_length=100_000),
        *good,
    )
    for output, kind in ((embeds, OmniError), (encode_error, RefusedError)):
        assert type(output.error) is kind and not output.images
        assert "Traceback" not in str(output.error) and "/" not in str(output.error)
    assert "RuntimeError while the request ran" in str(embeds.error)
    assert all(output.ok for output in rest)
    assert levels_apart(rest[0].images[0], rest[1].images[0]) <= 1  # two rows of one batch


@one_loop
@pytest.mark.parametrize("output_type", [None, "np", "latent"])
async def test_a_result_that_holds_nan_is_an_error_of_that_request(
    client: ProcessEngineClient, output_type: str | None
) -> None:
    """The cached residuals are NaN too: they are dropped, and the neighbour in the batch is as it is alone."""
    good = {"num_inference_steps": 10, "cache": "fast"}
    alone = await last(client, "alone", **good)
    empty = {"prompt_embeds": torch.full((1, 8, 128), torch.nan), "pooled_prompt_embeds": torch.zeros(1, 128)}
    nan, beside = await asyncio.gather(
        last(client, "nan", prompt=empty, output_type=output_type, **good), last(client, "beside", **good)
    )
    assert type(nan.error) is NumericalError and "numerical_error" in str(nan.error) and not nan.images
    assert nan.latents is None
    assert levels_apart(beside.images[0], alone.images[0]) <= 1
    await idle(client)


@one_loop
async def test_malformed_frames_are_dropped(client: ProcessEngineClient) -> None:
    for body in (
        b"",
        b"\xc1",
        b"\x93\x01\x02",
        b"\x81\xa4type\xa4Exec",
        os.urandom(5000),
        encode(Abort(["x"]))[4:] + b"!",
    ):
        client._engine.send(HEADER.pack(len(body)) + body)
    assert (await last(client, "after", num_inference_steps=2)).ok


@one_loop
async def test_what_could_not_be_read_is_not_sent(client: ProcessEngineClient) -> None:
    for wrong in (np.zeros((1,) * 17, np.float32), np.zeros(2, np.complex64), Image.new("RGB", (0, 4)), "\ud83c"):
        with pytest.raises(InvalidValueError):
            await last(client, "wrong", extra_args={"joint_attention_kwargs": wrong})
    for prompt in ("half \ud83c", {"prompt": "x", "negative_prompt": "half \udcff"}):
        with pytest.raises(InvalidValueError, match="prompt must hold whole characters"):
            await last(client, "wrong", prompt)
    assert (await last(client, "right", num_inference_steps=2)).ok


@one_loop
async def test_an_id_is_free_as_soon_as_its_client_has_left(client: ProcessEngineClient) -> None:
    """A retry right after a disconnect: the engine has not heard of the abort yet."""
    for _ in range(5):
        async with aclosing(client.generate("x", Params(num_inference_steps=900, cache="off"), "again")) as stream:
            await anext(stream)
            with pytest.raises(InvalidValueError, match="must not be in use"):
                await last(client, "again")
        assert (await last(client, "again", num_inference_steps=2)).request_id == "again"
    await idle(client)


@one_loop
async def test_requests_beyond_the_queue_are_refused_at_once(client: ProcessEngineClient) -> None:
    tasks = [asyncio.create_task(last(client, f"full-{i}", num_inference_steps=28, cache="off")) for i in range(8)]
    await until(lambda: len(client._requests) == 8)
    later = []
    for i in range(100):
        with pytest.raises(QueueFullError, match="4 requests are already waiting") as full:
            await last(client, f"more-{i}")
        later.append(full.value.retry_after_s)
    assert not any(task.done() for task in tasks), "refused while all of them run or wait"
    assert later == sorted(later) and 1.0 <= later[0] <= later[-1] < 120  # one place after another, and a bound
    assert all(output.ok for output in await asyncio.gather(*tasks))
    await idle(client)


@one_loop
async def test_cancel_and_abort_end_only_their_own_request_at_every_stage(client: ProcessEngineClient) -> None:
    alone = await last(client, "alone", num_inference_steps=60, cache="off")
    before = (await client.stats()).aborts_by_stage
    witness = asyncio.create_task(last(client, "witness", num_inference_steps=60, cache="off"))
    running = [asyncio.create_task(last(client, f"run-{i}", num_inference_steps=900, cache="off")) for i in range(3)]
    queued = [asyncio.create_task(last(client, f"wait-{i}")) for i in range(2)]
    await until(lambda: client._ledger._stats.running == 4 and client._ledger._stats.waiting == 2)
    running[0].cancel()  # what a disconnect does
    queued[0].cancel()
    await client.abort(["run-1", "run-2", "unknown"])
    ended = await asyncio.gather(*running[1:])
    assert all(isinstance(output.error, RequestAbortedError) and output.step < 900 for output in ended)
    assert not witness.done() and (await queued[1]).ok
    assert levels_apart((await witness).images[0], alone.images[0]) <= 1
    await idle(client)
    stages = (await client.stats()).aborts_by_stage
    assert stages["denoise"] + stages.get("encode", 0) - before.get("denoise", 0) - before.get("encode", 0) == 3
    assert stages["queued"] - before.get("queued", 0) == 1


@one_loop
async def test_deadlines_hold_while_waiting_and_while_running(client: ProcessEngineClient) -> None:
    long = {"num_inference_steps": 1000, "height": 256, "width": 256, "cache": "off"}  # minutes
    tasks = [asyncio.create_task(last(client, f"slow-{i}", timeout_s=4.0 + 0.1 * i, **long)) for i in range(4)]
    await until(lambda: client._ledger._stats.running == 4)
    waiting = await last(client, "queued", timeout_s=0.2)
    assert isinstance(waiting.error, DeadlineExceededError) and "had not begun" in str(waiting.error)
    ended = await asyncio.gather(*tasks)
    assert all(isinstance(output.error, DeadlineExceededError) and 0 < output.step < 1000 for output in ended)
    assert (await last(client, "in-time", num_inference_steps=2, timeout_s=30.0)).ok


@one_loop
async def test_a_lower_priority_number_runs_earlier(client: ProcessEngineClient) -> None:
    order: list[str] = []

    async def one(name: str, priority: int) -> None:
        assert (await last(client, name, num_inference_steps=4, priority=priority)).ok
        order.append(name)

    busy = [asyncio.create_task(last(client, f"busy-{i}", num_inference_steps=20)) for i in range(4)]
    await until(lambda: len(client._requests) == 4)
    await asyncio.gather(*(one(name, p) for name, p in (("late", 5), ("middle", 0), ("early", -5))), *busy)
    assert order[0] == "early"


@one_loop
async def test_draining_finishes_running_requests_and_refuses_new_ones(client: ProcessEngineClient) -> None:
    """The last test of the shared engine: nothing is taken any more."""
    task = asyncio.create_task(last(client, "drained", num_inference_steps=40, cache="off"))
    await until(lambda: client._requests)
    drain = asyncio.create_task(client.drain(20))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await last(client, "refused")
    await drain
    assert task.done() and task.result().ok and not client.ready
