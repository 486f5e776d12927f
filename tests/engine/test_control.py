"""What an operator does to an engine changes all of it or nothing, and is done again after a restart if it can be."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from pipelines import DEFAULTS, tiny_flux

from vllm_omni import Omni
from vllm_omni.engine.client import launch_engine
from vllm_omni.engine.control import EngineControl
from vllm_omni.engine.in_flight import InFlight
from vllm_omni.engine.interface import EngineCondition
from vllm_omni.engine.weights import modules_of
from vllm_omni.engine.wire import Control, Controlled, LoadAdapter, Sleep, StopProfile, UnloadAdapter, Wake
from vllm_omni.errors import ConflictError, DeviceLostError


@pytest.fixture
def control() -> Iterator[EngineControl]:
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS, max_loras=1) as omni:
        yield EngineControl(omni.engine)


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_adapter(tiny_flux(), tmp_path_factory.mktemp("adapters") / "ink", 0))


def test_an_adapter_that_requests_elsewhere_wait_with_is_not_pushed_out(control: EngineControl, ink: str) -> None:
    control.do(LoadAdapter("first", ink))
    with pytest.raises(ConflictError, match="all 1 adapters are in use"):
        control.do(LoadAdapter("second", ink, ["first"]))
    assert list(control.condition.adapters) == ["first"]
    control.do(LoadAdapter("second", ink, ["third"]))
    assert list(control.condition.adapters) == ["second"]
    control.do(UnloadAdapter("second"))


def test_a_wake_without_room_moves_nothing_and_may_be_tried_again(
    control: EngineControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.do(Sleep(1))
    weights = [p for module in modules_of(control._engine.worker.pipeline).values() for p in module.parameters()]
    places, left = [weight.data_ptr() for weight in weights], [3]

    def to(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left[0] -= 1
        return tensor.clone()

    with monkeypatch.context() as short:
        short.setattr(torch.Tensor, "to", to)
        with pytest.raises(ConflictError, match="no room"):
            control.do(Wake())
    assert [weight.data_ptr() for weight in weights] == places
    assert control.condition.asleep == 1 and control._engine.asleep
    control.do(Wake())
    assert control.condition.asleep == 0 and not control._engine.asleep


def test_what_cannot_be_done_again_after_a_restart_is_logged_whatever_it_raises(
    control: EngineControl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str, path: str) -> None:
        raise RuntimeError("a file of another time")

    monkeypatch.setattr(control._adapters, "load", fail)
    with caplog.at_level(logging.ERROR, "vllm_omni"):
        control.restore(EngineCondition(adapters={"ink": "/ink"}, asleep=1))
    assert "could not be done again" in caplog.text and "a file of another time" in caplog.text
    assert control.condition == EngineCondition(asleep=1) and control._engine.asleep


def test_a_device_that_is_lost_meanwhile_ends_the_process(
    control: EngineControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, path: str) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(control._adapters, "load", fail)
    with pytest.raises(DeviceLostError):
        control.restore(EngineCondition(adapters={"ink": "/ink"}))


async def test_an_engine_falls_asleep_from_the_order_on_until_it_has_answered() -> None:
    sent: list[Control] = []
    requests = InFlight(lambda _: None, backlog=1)
    profile = asyncio.create_task(requests.control(StopProfile(), sent.append))
    await asyncio.sleep(0)
    assert not requests.fall_asleep
    sleep = asyncio.create_task(requests.control(Sleep(), sent.append))
    await asyncio.sleep(0)
    assert requests.fall_asleep
    sleep.cancel()  # whoever asked has gone; the engine has not
    await asyncio.wait([sleep])
    assert requests.fall_asleep
    requests.note(Controlled(sent[1].control_id, EngineCondition(asleep=1)))
    assert not requests.fall_asleep
    requests.note(Controlled(sent[0].control_id, EngineCondition()))
    assert (await profile).asleep == 0


def test_a_process_that_ends_before_it_has_its_orders_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Ends(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(["true"], **more)
            started.append(self.pid)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(subprocess, "Popen", Ends)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError) as raised:  # whose traceback holds what was open
        launch_engine({"model": "demo"})
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert raised.value.errno
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], os.WNOHANG)
