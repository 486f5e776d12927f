"""Seconds are the device's, on one that runs behind its host: what a forward took, not how long its launch did."""

from __future__ import annotations

import time

import pytest
import torch
from pipelines import CURVE, DEFAULTS, embeds, tiny_flux

import fake_cuda
from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.kernels.device import DeviceClock


def timed(omni: Omni, asked: Params) -> bool:
    """Whether what the engine tells of a request is what the device did."""
    omni.engine.reports()
    with fake_cuda.device.clock.at(flops=5e6, queue=10**6) as clock, fake_cuda.device.watched() as waits:
        (output,) = omni.generate([embeds(0)], asked, use_tqdm=False)
        busy = clock.busy_s
    reports = omni.engine.reports()
    assert output.error is None and output.skipped_steps > 0
    assert [report.rows for report in reports if report.rows] == [1] * 8
    assert not [wait for wait in waits if wait.operation.startswith("device")]  # no synchronise
    told = sum(report.forward_s + report.coding_s for report in reports)
    computed = [report.forward_s for report in reports if report.rows and not report.skipped]
    skipped = [report.forward_s for report in reports if report.rows and report.skipped]
    whole = output.stage_durations["encode_and_denoise_s"]
    print(f"the device was busy for {busy:.3f} s, the engine tells {told:.3f} and {whole:.3f}")
    near = all(seconds == pytest.approx(busy, rel=0.1) for seconds in (told, whole))
    return near and max(skipped) < min(computed) / 2


@pytest.mark.alone
@pytest.mark.usefixtures("cuda")
def test_forwards_are_timed_by_the_device_and_never_waited_for() -> None:
    """A request alone: the device's work is the sum of what the engine reports, within a tenth."""
    pipeline = tiny_flux().to("cuda")
    asked = Params(num_inference_steps=8, seed=0, output_type="latent")
    config = {"mag_ratios": CURVE}
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, cache_backend="magcache", cache_config=config) as omni:
        omni.generate([embeds(0)], asked, use_tqdm=False)
        assert any(timed(omni, asked) for _ in range(3)), "the best of three rounds"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("drift", [0.5, 1.5])
def test_the_clocks_may_drift_apart(drift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment is never before its mark was asked for, or in the future, however the device counts its milliseconds."""
    own = torch.cuda.Event.elapsed_time
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda begin, end: drift * own(begin, end))
    clock, x = DeviceClock(torch.device("cuda:0")), torch.ones(64, 64, device="cuda:0")
    with fake_cuda.device.clock.at(flops=1e7, queue=10**6):
        for _ in range(5):
            asked = time.perf_counter()
            x @ x
            mark = clock.mark()
            torch.cuda.synchronize()
            time.sleep(0.01)
            assert asked <= clock.when(mark) <= time.perf_counter()
