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


@pytest.mark.alone
@pytest.mark.usefixtures("cuda")
def test_forwards_are_timed_by_the_device_and_never_waited_for() -> None:
    """A request alone: the device's work is the sum of what the engine reports, within a tenth."""
    pipeline = tiny_flux().to("cuda")
    asked = Params(num_inference_steps=8, seed=0, output_type="latent")
    config = {"mag_ratios": CURVE}
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, cache_backend="magcache", cache_config=config) as omni:
        omni.generate([embeds(0)], asked, use_tqdm=False)
        omni.engine.reports()
        with fake_cuda.device.clock.at(flops=5e6, queue=10**6) as clock, fake_cuda.device.watched() as waits:
            (output,) = omni.generate([embeds(0)], asked, use_tqdm=False)
            busy = clock.busy_s
        reports = omni.engine.reports()
    assert output.error is None and output.skipped_steps > 0
    assert [report.rows for report in reports if report.rows] == [1] * 8
    assert sum(report.forward_s + report.coding_s for report in reports) == pytest.approx(busy, rel=0.1)
    computed = [report.forward_s for report in reports if report.rows and not report.skipped]
    skipped = [report.forward_s for report in reports if report.rows and report.skipped]
    assert max(skipped) < min(computed) / 2
    durations = output.stage_durations
    assert durations["encode_and_denoise_s"] == pytest.approx(busy, rel=0.1)
    assert not [wait for wait in waits if wait.operation.startswith("device")]  # no synchronise


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
