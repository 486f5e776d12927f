"""A device that is short of memory: what is dropped, what is split, what fails, and what the error says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CURVE, DEFAULTS, embeds, save_tiny_flux, tiny_flux

import fake_cuda
from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import DeviceMemoryError, InvalidValueError, ModelLoadError
from vllm_omni.kernels import placement, room

pytestmark = pytest.mark.usefixtures("cuda")
N, STEPS = 12, 8


@pytest.fixture
def omni(cuda: None) -> Iterator[Omni]:
    config = {"mag_ratios": CURVE, "predictor": "linear"}
    pipeline = tiny_flux().to("cuda")
    with Omni.from_pipe(
        pipeline, defaults=DEFAULTS, cache_backend="magcache", cache_config=config, max_num_seqs=N
    ) as engine:
        yield engine


def run(omni: Omni, cache: Any, n: int = N, side: int = 64) -> list[Any]:
    asked = [
        Params(num_inference_steps=STEPS, seed=i, height=side, width=side, output_type="latent", cache=cache)
        for i in range(n)
    ]
    return omni.generate([embeds(i) for i in range(n)], asked, use_tqdm=False)


def peak_of(omni: Omni, cache: Any, n: int = N, side: int = 64) -> tuple[int, int]:
    """Bytes before a run, and the most during it."""
    gc.collect()
    fake_cuda.reset_peak(0)
    before, most = fake_cuda.used(0), 0
    for output in run(omni, cache, n, side):
        assert output.error is None
        most = max(most, int(output.peak_memory_mb * 2**20))
    return before, most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "share"), [(8, 0.25), *(pytest.param(24, share, marks=pytest.mark.slow) for share in (0.15, 0.2, 0.25))]
)
def test_a_cache_costs_no_request_its_picture_and_no_throughput(n: int, share: float) -> None:
    """On a device with a part of what `n` requests take together, each runs, and sooner with the cache."""
    side = 128
    rates = {"flops": 1e10, "bandwidth": 1e13, "launch_s": 1e-7, "queue": 10**7}  # so quick that nobody waits for it
    config = {"mag_ratios": CURVE, "predictor": "linear"}
    given: dict[str, Any] = {"defaults": DEFAULTS, "cache_backend": "magcache", "cache_config": config}
    given["gpu_memory_utilization"] = 1.0  # a tenth of what other tests hold is no part of the limit
    with Omni.from_pipe(tiny_flux().to("cuda"), max_num_seqs=n, **given) as free:
        run(free, "off", 1, side)  # what a first run makes once
        before, most = peak_of(free, "off", n, side)
        plain = [output.latents.cpu() for output in run(free, "off", n, side)]
        pipeline = free.engine.worker.pipeline
    limit, worked = before + int(share * (most - before)), {}
    for cache in ("off", None):
        gc.collect()
        with (
            fake_cuda.limit(limit),
            Omni.from_pipe(pipeline, max_num_seqs=n, **given) as short,
            fake_cuda.device.clock.at(**rates) as clock,
        ):
            outputs = run(short, cache, n, side)
            worked[cache] = clock.busy_s
        assert [output.error for output in outputs] == [None] * n
        if cache == "off":
            for output, other in zip(outputs, plain, strict=True):
                assert torch.allclose(output.latents.cpu(), other, rtol=1e-3, atol=1e-3)
        del outputs
    assert worked[None] < 0.8 * worked["off"]


@pytest.mark.slow
def test_what_helped_is_remembered(omni: Omni) -> None:
    before, most = peak_of(omni, "off")
    runner = omni.engine.worker.runner
    with fake_cuda.limit(before + (most - before) // 3):
        assert [output.error for output in run(omni, "off")] == [None] * N
        gc.collect()
        fake_cuda.device.kernels.clear()
        computed = runner.forwards["computed"]
        assert not any(output.error for output in run(omni, "off"))
    assert STEPS < runner.forwards["computed"] - computed <= STEPS * 6  # not one by one


@pytest.mark.slow
def test_a_device_that_has_room_again_is_used_again(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 2)
    before, most = peak_of(omni, "off")
    runner = omni.engine.worker.runner

    def forwards() -> int:
        computed = runner.forwards["computed"]
        assert [output.error for output in run(omni, "off")] == [None] * N
        return runner.forwards["computed"] - computed

    assert forwards() == STEPS
    with fake_cuda.limit(before + (most - before) // 3):
        forwards()
        assert forwards() > STEPS
    for _ in range(4):
        forwards()
    assert forwards() == STEPS


@pytest.mark.slow
def test_one_that_fits_alone_but_for_its_cache_goes_on_without(omni: Omni) -> None:
    """A cached step also keeps what went into the blocks, and what it adds: there is nothing to drop before it."""
    run(omni, None, 1)  # what a first run makes once
    (before, plain), (then, cached) = peak_of(omni, "off", 1), peak_of(omni, None, 1)
    alone, more = plain - before, cached - then
    assert more > 1.02 * alone
    gc.collect()
    with fake_cuda.limit(fake_cuda.used(0) + (alone + more) // 2):
        (output,) = run(omni, None, 1)
    assert output.error is None and output.computed_steps == STEPS
    (output,) = run(omni, None, 1)
    assert output.error is None and output.computed_steps == STEPS  # remembered: it does not try again


@pytest.mark.slow
def test_one_that_does_not_fit_alone_says_what_would(omni: Omni) -> None:
    assert not any(output.error for output in run(omni, "off", 1, 32))
    gc.collect()
    before = fake_cuda.used(0)
    _, small = peak_of(omni, "off", 1)
    with fake_cuda.limit(int(small * 1.02)):
        large, = run(omni, "off", 1, 256)  # fmt: skip
        assert isinstance(large.error, DeviceMemoryError)
        assert "does not fit on cuda:0 even alone" in str(large.error) and "% of its pixels" in str(large.error)
        assert not any(output.error for output in run(omni, "off", 1, 32))
    gc.collect()
    assert fake_cuda.used(0) <= before  # with `large` and its traceback still held


def test_residuals_have_a_budget_from_what_is_free(omni: Omni) -> None:
    store = omni.engine.worker._backends["magcache"].store
    assert store.budget == pytest.approx(0.45 * fake_cuda.TOTAL_BYTES, rel=0.01)
    config = {"mag_ratios": CURVE, "memory_budget_mb": 3.0}
    with Omni.from_pipe(tiny_flux().to("cuda"), cache_backend="magcache", cache_config=config) as other:
        assert other.engine.worker._backends["magcache"].store.budget == 3 * 2**20
    with (
        fake_cuda.limit(2**30),
        Omni.from_pipe(
            tiny_flux().to("cuda"),
            cache_backend="magcache",
            cache_config={"mag_ratios": CURVE},
            gpu_memory_utilization=0.5,
        ) as half,
    ):
        free = 0.5 * 2**30 - fake_cuda.used(0)  # whatever else lives in this process counts
        assert half.engine.worker._backends["magcache"].store.budget == pytest.approx(free / 2, rel=0.01)
    with pytest.raises(InvalidValueError, match="gpu_memory_utilization"):
        Omni.from_pipe(tiny_flux(), gpu_memory_utilization=1.5)


def used_now() -> int:
    """Bytes of device 0 that are really held."""
    gc.collect()
    return fake_cuda.used(0)


@pytest.mark.slow
def test_a_peak_is_the_requests_own(tmp_path: Path) -> None:
    folder, before = str(save_tiny_flux(tmp_path / "model")), used_now()
    with Omni(folder, device="cuda:1", dtype="float32", prompt_cache_mb=0) as omni:

        def peak(n: int, side: int) -> float:
            asked = Params(num_inference_steps=2, height=side, width=side)
            outputs = omni.generate(["red apple"] * n, asked, use_tqdm=False)
            assert not any(output.error for output in outputs)
            return outputs[0].peak_memory_mb

        small, large, again = peak(1, 32), peak(8, 128), peak(1, 32)
        assert large > 1.2 * small and again == pytest.approx(small, rel=0.05)
        assert used_now() <= before and omni.engine.worker.pipeline.device == torch.device("cuda:1")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder, before = str(save_tiny_flux(tmp_path / "model")), used_now()
    with (
        fake_cuda.limit(before + 300_000),
        pytest.raises(ModelLoadError, match=r"do not fit on cuda.*enable_cpu_offload"),
    ):
        Omni(folder, device="cuda")
    assert used_now() <= before


def test_what_is_left_of_a_split_module_comes_later() -> None:
    module, before = tiny_flux().transformer, used_now()
    with (
        fake_cuda.limit(before + 20_000),
        pytest.raises(ModelLoadError, match="does not fit on cuda"),
    ):
        placement.finish_move(module, torch.device("cuda"))
    placement.finish_move(module, torch.device("cuda"))
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cuda"}


def test_a_driver_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(placement, "driver_cuda", lambda: (12, 4))
    with pytest.raises(InvalidValueError, match="update the driver"):
        placement.device_for(None)
    with pytest.raises(InvalidValueError, match=r"update the driver.*cuda:1"):
        placement.device_for("cuda:1")
    assert placement.device_for("cpu") == "cpu"
    monkeypatch.setattr(placement, "driver_cuda", lambda: None)
    assert placement.device_for(None) == "cpu"
    with pytest.raises(InvalidValueError, match="there is no driver"):
        placement.device_for("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InvalidValueError, match="torch is a CPU build"):
        placement.device_for("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (placement.device_for(None), placement.device_for("cuda:1")) == ("cuda", "cuda:1")


def test_weights_without_values_have_a_fingerprint() -> None:
    from vllm_omni.diffusion.cache.profile import fingerprint

    transformer = tiny_flux().transformer
    known = fingerprint(transformer)
    assert fingerprint(transformer.to("cuda")) == known
    assert len(fingerprint(transformer.to("meta"))) == len(known)


def test_the_report_names_every_device() -> None:
    from vllm_omni.collect_env import report

    with fake_cuda.limit(2**31, 1):
        facts = report().facts
    assert facts["will run on"].startswith("cuda, bfloat16")
    assert "80.0 GiB free" in facts["cuda:0"] and facts["cuda:1"].endswith("2.0 GiB free")
