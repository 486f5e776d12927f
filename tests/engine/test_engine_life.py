"""Start, death and end of the engine process: real signals, restarts, models that cannot be loaded."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from process_client import ARGS, gone, last, until

from vllm_omni.engine.client import ProcessEngineClient, launch_engine
from vllm_omni.errors import (
    EngineClosedError,
    EngineDeadError,
    ModelLoadError,
    UnknownKeyError,
)
from vllm_omni.model_folder import ASSETS

one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.slow
@pytest.mark.alone
@one_loop
async def test_a_killed_or_hung_engine_is_restarted_up_to_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """By a signal, by standing still, and at last by a step that takes too long."""
    quick = {"heartbeat_s": 0.2, "heartbeat_timeout_s": 6.0, "warmup": False, "max_restarts": 2, "step_timeout_s": 4.0}
    async with ProcessEngineClient(ARGS, **quick) as client:
        time.sleep(6.5)  # the front end's own loop stands still: the engine is not to blame
        await asyncio.sleep(0.6)
        assert client.ready and (await client.stats()).restarts == 0
        for number, kind in ((signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "SIGKILL")):
            pid = client._engine.process.pid
            tasks = [asyncio.create_task(last(client, f"{number}-{i}", num_inference_steps=900)) for i in range(6)]
            await until(lambda: client._ledger._stats.running == 4)
            os.kill(pid, number)
            ended = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            assert all(isinstance(output.error, EngineDeadError) and kind in str(output.error) for output in ended)
            assert not client.ready and gone(pid)
            with pytest.raises(EngineDeadError, match="being restarted") as refused:
                await last(client, "too-early")
            assert refused.value.retry_after_s >= 1
            with pytest.raises(EngineDeadError):
                await client.check_health()
            await until(lambda: client.ready, 90)
            assert (await last(client, "again", num_inference_steps=2)).ok
        stats = await client.stats()
        assert stats.restarts == 2 and stats.requests == {"failed": 12, "finished": 2}
        slow = await last(client, "slow", num_inference_steps=2, cache="off", height=2048, width=2048)
        assert isinstance(slow.error, EngineDeadError) and "its step has taken" in caplog.text
        await until(lambda: client._dead)
        with pytest.raises(EngineDeadError, match="died more than 2 times"):
            await last(client, "dead")
    with pytest.raises(EngineClosedError):
        await last(client, "closed")


FAILING = """
import sys
if "vllm_omni.engine.process" in sys.orig_argv:
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
    step, steps = DiffusionEngine.step, iter(range(10**6))
    def failing(engine):
        if next(steps) == 6:
            raise {kind}("injected")
        return step(engine)
    DiffusionEngine.step = failing
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RuntimeError", "SystemExit"])
async def test_a_step_that_fails_ends_its_process_and_everybody_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING.format(kind=kind))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with ProcessEngineClient(ARGS, warmup=False, max_restarts=1) as client:
        tasks = [asyncio.create_task(last(client, f"{i}", num_inference_steps=900)) for i in range(6)]
        ended = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        assert all(isinstance(output.error, EngineDeadError) for output in ended)
        assert "injected" in capfd.readouterr().err
        await until(lambda: client.ready, 60)
        assert (await last(client, "again", num_inference_steps=2)).ok


@pytest.mark.slow
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
    await until(lambda: gone(pid), 20)
    parent.wait()
    with parent.stdout, parent.stderr:  # also: the engine's own log is JSON where the front end's is
        logged = [json.loads(line) for line in parent.stderr if line.startswith("{")]
    assert any(line["logger"].startswith("vllm_omni.diffusion") and line["level"] == "INFO" for line in logged)


@one_loop
async def test_a_model_that_cannot_be_loaded_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownKeyError, match="max_num_seqs"):
        ProcessEngineClient({"model": "demo", "max_num_seq": 4})
    broken = tmp_path / "model"
    shutil.copytree(ASSETS / "demo", broken)
    weights = next((broken / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    client = ProcessEngineClient({"model": str(broken)})
    with pytest.raises(ModelLoadError, match="is truncated"):
        await client.start()
    assert "Traceback" not in capfd.readouterr().err and not caplog.records
    with pytest.raises(EngineDeadError):
        await last(client, "never")
    process = client._engine.process
    await client.shutdown()
    assert process.poll() is not None


@pytest.mark.slow
async def test_a_process_launched_earlier_becomes_the_first_engine() -> None:
    launch = launch_engine(ARGS, warmup=False)
    async with ProcessEngineClient(ARGS, warmup=False, launch=launch) as client:
        assert client._engine is not None and client._engine.process is launch.process
        assert (await last(client, "one", num_inference_steps=2)).ok
        launch.process.kill()
        await until(lambda: client.ready and client._engine.process is not launch.process, 60)
        assert (await last(client, "two", num_inference_steps=2)).ok
    assert launch.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("settings", [{"warmup": True}, {"warmup": False}], ids=["other settings", "never started"])
async def test_an_unused_launched_process_is_ended(settings: dict[str, Any]) -> None:
    launch = launch_engine(ARGS, warmup=False)
    client = ProcessEngineClient(ARGS, launch=launch, **settings)
    await client.shutdown()
    assert launch.process.returncode == -signal.SIGKILL and launch.end.fileno() == -1


async def test_a_launched_process_reports_why_it_cannot_load(tmp_path: Path) -> None:
    arguments = ARGS | {"model": str(tmp_path / "missing")}
    launch = launch_engine(arguments)
    await until(lambda: launch.process.poll() is not None)
    with pytest.raises(ModelLoadError, match="missing"):
        await ProcessEngineClient(arguments, launch=launch).start()
