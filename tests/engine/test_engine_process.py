"""The engine in a process of its own, seen from its client: real processes, the shipped model, real signals."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from paths import ROOT
from PIL import Image

from vllm_omni import Omni
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.loader import ASSETS
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.engine import cost
from vllm_omni.engine.client import ProcessEngineClient, launch_engine
from vllm_omni.engine.process import Link
from vllm_omni.engine.supervisor import Restarts
from vllm_omni.engine.wire import HEADER, MAX_FRAME_BYTES, Abort, Add, Outputs, decode_command, decode_event, encode
from vllm_omni.errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    InvalidValueError,
    ModelLoadError,
    NumericalError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    UnknownKeyError,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.inputs.data import normalise_prompt
from vllm_omni.outputs import OmniRequestOutput

one_loop = pytest.mark.asyncio(loop_scope="module")
ARGS = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": 4}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[ProcessEngineClient]:
    async with ProcessEngineClient(ARGS, max_queued_requests=4) as running:
        yield running
        process = running._engine.process
    assert process.poll() is not None


async def last(client: ProcessEngineClient, name: str, prompt: Any = "red apple", **given: Any) -> OmniRequestOutput:
    options = {key: given.pop(key) for key in ("priority", "timeout_s") if key in given}
    outputs = [o async for o in client.generate(prompt, Params(**{"seed": 0} | given), name, **options)]
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def until(condition: Any, seconds: float = 30.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def idle(client: ProcessEngineClient) -> None:
    await until(lambda: not client._requests)
    await asyncio.sleep(0.1)  # the report that follows the last output
    stats = await client.stats()
    assert (stats.running, stats.waiting, stats.cache_bytes, stats.queued_cost_s) == (0, 0, 0, 0.0)


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def gone(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    return True


# ------------------------------------------------------------------------------------------------------ generation


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
                assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@one_loop
async def test_the_front_end_needs_no_torch() -> None:
    code = "import sys, vllm_omni.engine.client; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "set()"


@one_loop
async def test_info_says_what_was_loaded(client: ProcessEngineClient) -> None:
    info = client.info
    assert (info.name, info.pipeline, info.size_multiple, info.previews) == ("demo", "FluxPipeline", 8, True)
    assert info.denoisers == {"transformer": "FluxTransformer2DModel"} and not info.image_input
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
async def test_stats_count_what_was_done(client: ProcessEngineClient) -> None:
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


# ---------------------------------------------------------------------------------------------- refusals and errors


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
        await last(client, "bad", priority=10**6)
    with pytest.raises(InvalidValueError, match="timeout_s"):
        await last(client, "bad", timeout_s=float("nan"))
    with pytest.raises(InvalidValueError, match="generator"):
        await last(client, "bad", generator=torch.Generator())
    with pytest.raises(InvalidValueError, match="plain values"):
        await last(client, "bad", extra_args={"joint_attention_kwargs": object()})
    assert (await last(client, "good", num_inference_steps=2)).ok


@one_loop
async def test_a_fault_of_one_request_ends_that_one_alone(client: ProcessEngineClient) -> None:
    """A wrong shape in the denoiser, a wrong length before it: neighbours in the batch do not notice."""
    wrong = {"prompt_embeds": torch.zeros(1, 4, 7), "pooled_prompt_embeds": torch.zeros(1, 128)}
    good = [last(client, f"good-{i}", num_inference_steps=10) for i in range(2)]
    embeds, encode_error, *rest = await asyncio.gather(
        last(client, "wrong", prompt=wrong, num_inference_steps=10),
        last(client, "early", num_inference_steps=10, max_sequence_length=100_000),
        *good,
    )
    for output in (embeds, encode_error):
        assert type(output.error) is OmniError and not output.images
        assert "Traceback" not in str(output.error) and "/" not in str(output.error)
    assert "RuntimeError while the request ran" in str(embeds.error)
    assert all(output.ok for output in rest)
    assert np.array_equal(np.asarray(rest[0].images[0]), np.asarray(rest[1].images[0]))


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
    assert np.abs(np.asarray(beside.images[0], int) - np.asarray(alone.images[0], int)).max() <= 1
    await idle(client)


@one_loop
async def test_frames_that_nobody_should_send_are_dropped(client: ProcessEngineClient) -> None:
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


def test_an_oversized_frame_is_skipped_and_the_next_one_read() -> None:
    ours, theirs = socket.socketpair()
    ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
    link = Link(theirs, lambda: ended.put(True))
    ours.sendall(HEADER.pack(MAX_FRAME_BYTES + 1))
    block, left = bytes(2**24), MAX_FRAME_BYTES + 1
    while left:
        left -= ours.send(block[: min(left, len(block))])
    ours.sendall(encode(Abort(["mine"])))
    assert link.commands.get(timeout=20) == Abort(["mine"])
    ours.close()
    assert ended.get(timeout=5)
    theirs.close()


# ------------------------------------------------------------------------------------- the queue, aborts, deadlines


@one_loop
async def test_beyond_the_queue_requests_are_refused_at_once(client: ProcessEngineClient) -> None:
    tasks = [asyncio.create_task(last(client, f"full-{i}", num_inference_steps=28, cache="off")) for i in range(8)]
    await until(lambda: len(client._requests) == 8)
    seconds, later = [], []
    for i in range(100):
        began = time.perf_counter()
        with pytest.raises(QueueFullError, match="4 requests wait already") as full:
            await last(client, f"more-{i}")
        seconds.append(time.perf_counter() - began)
        later.append(full.value.retry_after_s)
    assert sorted(seconds)[98] < 0.02
    assert later == sorted(later) and 1.0 <= later[0] <= later[-1] < 120  # one place after another, and a bound
    assert all(output.ok for output in await asyncio.gather(*tasks))
    await idle(client)


@one_loop
async def test_leaving_and_abort_end_a_request_at_every_stage_and_no_other(client: ProcessEngineClient) -> None:
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
    away = np.asarray((await witness).images[0], int) - np.asarray(alone.images[0], int)
    assert np.abs(away).max() <= 1
    await idle(client)
    stages = (await client.stats()).aborts_by_stage
    assert stages["denoise"] + stages.get("encode", 0) - before.get("denoise", 0) - before.get("encode", 0) == 3
    assert stages["queued"] - before.get("queued", 0) == 1


@one_loop
async def test_deadlines_hold_while_waiting_and_while_running(client: ProcessEngineClient) -> None:
    began = time.monotonic()
    slow = [last(client, f"slow-{i}", num_inference_steps=1000, cache="off", timeout_s=1.0 + 0.1 * i) for i in range(4)]
    tasks = [asyncio.create_task(one) for one in slow]
    await until(lambda: client._ledger._stats.running == 4)
    waiting = await last(client, "queued", timeout_s=0.2)
    assert isinstance(waiting.error, DeadlineExceededError) and "had not begun" in str(waiting.error)
    ended = await asyncio.gather(*tasks)
    assert all(isinstance(output.error, DeadlineExceededError) and output.step > 0 for output in ended)
    assert time.monotonic() - began < 2.5
    assert (await last(client, "in-time", num_inference_steps=2, timeout_s=30.0)).ok


@one_loop
async def test_lower_priority_begins_earlier(client: ProcessEngineClient) -> None:
    order: list[str] = []

    async def one(name: str, priority: int) -> None:
        assert (await last(client, name, num_inference_steps=4, priority=priority)).ok
        order.append(name)

    busy = [asyncio.create_task(last(client, f"busy-{i}", num_inference_steps=20)) for i in range(4)]
    await until(lambda: len(client._requests) == 4)
    await asyncio.gather(*(one(name, p) for name, p in (("late", 5), ("middle", 0), ("early", -5))), *busy)
    assert order[0] == "early"


@one_loop
async def test_draining_ends_what_runs_and_takes_nothing_new(client: ProcessEngineClient) -> None:
    """The last test of the shared engine: nothing is taken any more."""
    task = asyncio.create_task(last(client, "drained", num_inference_steps=40, cache="off"))
    await until(lambda: client._requests)
    drain = asyncio.create_task(client.drain(20))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await last(client, "refused")
    await drain
    assert task.done() and task.result().ok and not client.ready


# ---------------------------------------------------------------------------------------------------- life and death


@one_loop
async def test_a_killed_and_a_hung_engine_are_replaced_twice_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    """By a signal, by standing still, and at last by a step that takes too long."""
    quick = {"heartbeat_s": 0.2, "heartbeat_timeout_s": 2.0, "warmup": False, "max_restarts": 2, "step_timeout_s": 4.0}
    async with ProcessEngineClient(ARGS, **quick) as client:
        time.sleep(2.5)  # the front end's own loop stands still: the engine is not to blame
        await asyncio.sleep(0.6)
        assert client.ready and (await client.stats()).restarts == 0
        for number, kind in ((signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "SIGKILL")):
            pid = client._engine.process.pid
            tasks = [asyncio.create_task(last(client, f"{number}-{i}", num_inference_steps=900)) for i in range(6)]
            await until(lambda: client._ledger._stats.running == 4)
            os.kill(pid, number)
            ended = await asyncio.wait_for(asyncio.gather(*tasks), 10)
            assert all(isinstance(output.error, EngineDeadError) and kind in str(output.error) for output in ended)
            assert not client.ready and gone(pid)
            with pytest.raises(EngineDeadError, match="being restarted") as refused:
                await last(client, "too-early")
            assert refused.value.retry_after_s >= 1
            with pytest.raises(EngineDeadError):
                await client.check_health()
            await until(lambda: client.ready, 90)
            assert processor_s(client._engine.process.pid) < 15  # the wall's clock on a machine with nothing else to do
            assert (await last(client, "again", num_inference_steps=2)).ok
        stats = await client.stats()
        assert stats.restarts == 2 and stats.requests == {"failed": 12, "finished": 2}
        slow = await last(client, "slow", num_inference_steps=2, cache="off", height=1024, width=1024)
        assert isinstance(slow.error, EngineDeadError) and "its step has taken" in caplog.text
        await until(lambda: client._dead)
        with pytest.raises(EngineDeadError, match="died more than 2 times"):
            await last(client, "dead")
    with pytest.raises(EngineClosedError):
        await last(client, "closed")


@one_loop
async def test_the_engine_does_not_outlive_its_parent() -> None:
    code = f"""
import asyncio
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
async def main():
    client = await ProcessEngineClient({ARGS!r}, warmup=False, log_json=True).start()
    print(client._engine.process.pid, flush=True)
    async for _ in client.generate("x", OmniDiffusionSamplingParams(num_inference_steps=1000, cache="off"), "x"):
        pass
asyncio.run(main())
"""
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    assert parent.stdout is not None and parent.stderr is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    await asyncio.sleep(0.3)
    parent.kill()
    assert await until(lambda: gone(pid), 5) < 5
    parent.wait()
    with parent.stdout, parent.stderr:  # also: the engine's own log is JSON where the front end's is
        logged = [json.loads(line) for line in parent.stderr if line.startswith("{")]
    assert any(line["logger"].startswith("vllm_omni.diffusion") and line["level"] == "INFO" for line in logged)


@one_loop
async def test_what_cannot_be_loaded_is_said_once_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownKeyError, match="max_num_seqs"):
        ProcessEngineClient({"model": "demo", "max_num_seq": 4})
    broken = tmp_path / "model"
    shutil.copytree(ASSETS / "demo", broken)
    weights = next((broken / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    client = ProcessEngineClient({"model": str(broken)})
    began = time.monotonic()
    with pytest.raises(ModelLoadError, match="is truncated"):
        await client.start()
    assert time.monotonic() - began < 10
    assert "Traceback" not in capfd.readouterr().err and not caplog.records
    with pytest.raises(EngineDeadError):
        await last(client, "never")
    process = client._engine.process
    await client.shutdown()
    assert process.poll() is not None


# ------------------------------------------------------------------------- the engine itself, with a fault put into it


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffusionEngine]:
    made = DiffusionEngine(OmniDiffusionConfig(**ARGS))
    yield made
    made.close()


def add(engine: DiffusionEngine, name: str, prompt: str = "sun", **params: Any) -> None:
    given = Params(**{"seed": 1, "num_inference_steps": 12, "cache": "fast"} | params)
    engine.add_request(OmniDiffusionRequest(name, prompt, normalise_prompt(prompt), given))


def finish(engine: DiffusionEngine) -> dict[str, OmniRequestOutput]:
    ended: dict[str, OmniRequestOutput] = {}
    while engine.has_unfinished_requests():
        ended |= {output.request_id: output for output in engine.step()}
    return ended


@pytest.mark.parametrize("place", ["encode", "step", "cache", "decode"])
def test_a_fault_at_any_place_costs_one_request(
    engine: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    add(engine, "alone")
    alone = np.asarray(finish(engine)["alone"].images[0], int)
    pipeline, seen = engine.worker.pipeline, []

    def failing(original: Any, hits: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            if hits(args, kwargs):
                seen.append(place)
                raise RuntimeError("injected")
            return original(*args, **kwargs)

        return act

    if place == "encode":
        failed = failing(pipeline.encode_prompt, lambda args, kwargs: kwargs["prompt"] == "bad")
        monkeypatch.setattr(pipeline, "encode_prompt", failed)
    elif place == "step":
        module = pipeline.transformer
        failed = failing(module.forward, lambda args, kwargs: bool((kwargs["guidance"] == 9.0).any()))
        monkeypatch.setattr(module, "forward", failed)
    elif place == "decode":  # the bad one is the first to end
        monkeypatch.setattr(pipeline.vae, "decode", failing(pipeline.vae.decode, lambda args, kwargs: not seen))
    for i in range(3):
        add(engine, f"good-{i}")
    add(engine, "bad", "bad", guidance_scale=9.0, **({"num_inference_steps": 2} if place == "decode" else {}))
    first = engine.step()
    if place == "cache":
        while engine.stage("bad") != "denoise":
            first += engine.step()
        cache = engine._entries["bad"].state.cache
        monkeypatch.setattr(cache, "forecast", failing(cache.forecast, lambda args, kwargs: True))
    ended = {output.request_id: output for output in first} | finish(engine)
    assert seen and isinstance(ended["bad"].error, RuntimeError) and not ended["bad"].images
    for i in range(3):
        assert np.abs(np.asarray(ended[f"good-{i}"].images[0], int) - alone).max() <= 1
    assert engine.worker.cache_bytes == 0


def test_aborted_requests_leave_nothing_for_the_garbage_collector(engine: DiffusionEngine) -> None:
    """What a request held is free the moment it ends: no cycle keeps its tensors until a collection."""

    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(3):
            names = [f"left-{turn}-{i}" for i in range(8)]
            for name in names:
                add(engine, name)
            for _ in range(3):
                engine.step()
            engine.abort(names)
            assert len(engine.collect()) == 8
            counts.append(tensors())
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2] and engine.worker.cache_bytes == 0


# ------------------------------------------------------------------------------------------------- launched before


async def test_a_process_that_was_launched_before_is_the_first_engine() -> None:
    launch = launch_engine(ARGS, warmup=False)
    async with ProcessEngineClient(ARGS, warmup=False, launch=launch) as client:
        assert client._engine is not None and client._engine.process is launch.process
        assert (await last(client, "one", num_inference_steps=2)).ok
        launch.process.kill()
        await until(lambda: client.ready and client._engine.process is not launch.process, 60)
        assert (await last(client, "two", num_inference_steps=2)).ok
    assert launch.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("settings", [{"warmup": True}, {"warmup": False}], ids=["other settings", "never started"])
async def test_a_launched_process_that_nobody_wants_is_ended(settings: dict[str, Any]) -> None:
    launch = launch_engine(ARGS, warmup=False)
    client = ProcessEngineClient(ARGS, launch=launch, **settings)
    await client.shutdown()
    assert launch.process.returncode == -signal.SIGKILL and launch.end.fileno() == -1


async def test_a_launched_process_tells_why_it_cannot_load(tmp_path: Path) -> None:
    arguments = ARGS | {"model": str(tmp_path / "missing")}
    launch = launch_engine(arguments)
    await until(lambda: launch.process.poll() is not None)
    with pytest.raises(ModelLoadError, match="missing"):
        await ProcessEngineClient(arguments, launch=launch).start()


# ------------------------------------------------------------------------------------------------------- pure parts


def test_what_crosses_comes_back_as_it_was() -> None:
    picture = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    tensor = torch.randn(2, 3).bfloat16()
    add = decode_command(encode(Add("a", {"image": picture, "embeds": tensor}, {"seed": 2**64 - 1}, 0, 1.0, None))[4:])
    assert isinstance(add, Add) and add.params == {"seed": 2**64 - 1}
    assert np.array_equal(np.asarray(add.prompt["image"]), np.asarray(picture))
    assert torch.equal(add.prompt["embeds"], tensor) and add.prompt["embeds"].dtype == torch.bfloat16
    output = OmniRequestOutput(
        "a", error=QueueFullError(3, 7.5), latents=np.eye(2, dtype=np.float32), plan=(True, False)
    )
    (back,) = decode_event(encode(Outputs([output]))[4:]).outputs
    assert (
        type(back.error) is QueueFullError and back.error.retry_after_s == 7.5 and str(back.error) == str(output.error)
    )
    assert back.plan == (True, False) and np.array_equal(back.latents, np.eye(2))


def test_a_lying_picture_or_array_is_refused() -> None:
    good = encode(Add("a", Image.new("RGB", (4, 4)), {}, 0, 1.0, None))[4:]
    wide = good.replace(b"\x92\x04\x04", b"\x92\x7f\x04")
    assert wide != good
    for body in (wide, good.replace(b"\xa3RGB", b"\xa3XYZ"), good[:-5]):
        with pytest.raises(ValueError):
            decode_command(body)
    array = encode(Add("a", np.zeros((4, 4), np.float32), {}, 0, 1.0, None))[4:]
    for body in (array.replace(b"\x92\x04\x04", b"\x92\xff\x04"), array.replace(b"float32", b"float99")):
        with pytest.raises(ValueError):
            decode_command(body)


def test_unknown_errors_cross_without_their_text() -> None:
    output = OmniRequestOutput("a", error=RuntimeError("at 0x7f00dead in /srv/secret.py"))
    (back,) = decode_event(encode(Outputs([output]))[4:]).outputs
    assert type(back.error) is OmniError and "RuntimeError" in str(back.error) and "secret" not in str(back.error)


def test_planned_seconds_follow_what_was_measured() -> None:
    costs = cost.no_costs()
    assert cost.planned_seconds(costs, 4096, 10, 0) == 10 * cost.UNKNOWN_ROW_S
    cost.note(costs.computed, 4096, 0.1)
    cost.note(costs.skipped, 4096, 0.01)
    cost.note(costs.ends, 4096, 0.5)
    assert cost.planned_seconds(costs, 4096, 10, 20) == pytest.approx(1.0 + 0.2 + 0.5)
    assert cost.planned_seconds(costs, 8192, 10, 0) == pytest.approx(2.0 + 1.0)  # in proportion to the pixels
    for _ in range(200):
        cost.note(costs.computed, 4096, 0.2)
    assert costs.computed[4096] == pytest.approx(0.2, rel=1e-3)
    for _ in range(500):  # forwards of 16 rows in 1.6 s and of one in 0.4 s: 17 rows in 2 s, not 0.25 s a row
        cost.note_rows(costs.computed, 4096, 1.6, 16)
        cost.note_rows(costs.computed, 4096, 0.4, 1)
    assert costs.computed[4096] == pytest.approx(2.0 / 17, rel=0.03)
    for pixels in range(1000):
        cost.note(costs.computed, pixels, 1.0)
    assert len(costs.computed) == 64


def test_those_sent_away_come_back_one_after_another() -> None:
    promised, told = 0.0, []
    for _ in range(20):
        promised = cost.come_back(100.0, promised, 2.0, 16.0)
        told.append(promised - 100.0)
    assert told == [2.0 * (i + 1) for i in range(8)] + [16.0] * 12


def test_restarts_pause_longer_and_stop() -> None:
    restarts = Restarts(4, 100.0)
    served = [True, False, False, True, True]
    assert [restarts.pause(now, s) for now, s in enumerate(served)] == [0.0, 0.5, 1.0, 0.0, None]
    assert restarts.pause(150, True) == 0.0 and restarts.count == 5
