"""A device that fails in every call ends its process within one step, and every request once; another takes over."""

from __future__ import annotations

import asyncio
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import DEFAULTS, embeds, tiny_flux
from stepping import add

import fake_cuda
from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.loop import EngineLoop
from vllm_omni.engine.wire import Outputs
from vllm_omni.errors import DeviceLostError, EngineDeadError, OmniError
from vllm_omni.kernels.device import is_lost, is_out_of_memory

SITE = Path(__file__).parent / "site"
LATENT = Params(num_inference_steps=6, seed=0, output_type="latent")


@pytest.mark.parametrize(
    ("error", "lost", "short"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True, False),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), False, True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False, False),
        (RuntimeError("Expected all tensors to be on the same device"), False, False),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), False, False),
        (torch.AcceleratorError("CUDA error: too many resources requested for launch"), False, False),
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), False, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`"), False, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True, False),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), False, False),
        (ValueError("CUDA error: no"), False, False),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error, Cuda failure 2"), True, False),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"), True, False),
    ],
)
def test_errors_are_told_apart(error: Exception, lost: bool, short: bool) -> None:
    assert (is_lost(error), is_out_of_memory(error)) == (lost, short)
    wrapped = OSError("a library wrapped it")
    wrapped.__cause__ = error
    assert is_lost(wrapped) == lost
    try:
        try:
            raise error
        except type(error):
            raise KeyError("while it was handled")  # noqa: B904
    except KeyError as other:
        assert is_lost(other) == lost


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kernels", [1, 40, 900])
def test_every_request_ends_once_and_no_other_is_taken(kernels: int) -> None:
    """At the start, in a pipeline's own code, or in a forward: wherever the kernels happen to be."""
    with Omni.from_pipe(tiny_flux().to("cuda"), defaults=DEFAULTS) as omni:
        fake_cuda.device.kernels_left = kernels
        outputs = omni.generate([embeds(i) for i in range(3)], LATENT, use_tqdm=False)
        assert [type(output.error) for output in outputs] == [DeviceLostError] * 3
        assert "illegal memory access" in str(outputs[0].error)
        ran = fake_cuda.device.kernels.total()
        (refused,) = omni.generate([embeds(0)], LATENT, use_tqdm=False)
        assert isinstance(refused.error, DeviceLostError) and fake_cuda.device.kernels.total() == ran


@pytest.mark.usefixtures("cuda")
def test_a_loss_that_the_clock_sees_first_ends_the_engine_and_no_output_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Omni.from_pipe(tiny_flux().to("cuda"), defaults=DEFAULTS) as omni:
        engine, step, sent = omni.engine, omni.engine.step, []
        clock = engine.worker.runner.clock

        def lost_at_the_end() -> list[Any]:
            if outputs := step():
                clock.later(clock.mark(), list)  # what else the device was given
                fake_cuda.device.lost = "CUDA error: an illegal memory access was encountered"
            return outputs

        monkeypatch.setattr(engine, "step", lost_at_the_end)
        add(omni, "ends", embeds(0), LATENT)
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            EngineLoop(engine, queue.SimpleQueue(), sent.append).run()
        ended = [output for event in sent if isinstance(event, Outputs) for output in event.outputs if output.finished]
        assert [(output.request_id, output.error) for output in ended] == [("ends", None)]
        with pytest.raises(DeviceLostError, match="make a new engine"):
            add(omni, "later", embeds(0), LATENT)


@pytest.mark.usefixtures("cuda")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread ends by its error
async def test_an_engine_in_a_thread_ends() -> None:
    async def one(omni: AsyncOmni, i: int) -> Any:
        async for output in omni.generate(embeds(i), LATENT):
            last = output
        return last

    async with AsyncOmni.from_pipe(tiny_flux().to("cuda"), defaults=DEFAULTS) as omni:
        fake_cuda.device.kernels_left = 900
        ended = await asyncio.gather(*(one(omni, i) for i in range(3)), return_exceptions=True)
        assert [type(error) for error in ended] == [EngineDeadError] * 3


async def served(client: ProcessEngineClient, i: int) -> str:
    """The outcome of one request, in a word."""
    try:
        async for output in client.generate("red apple", Params(num_inference_steps=4, seed=i), f"r{i}"):
            last = output
    except EngineDeadError as error:
        return str(error)
    return str(last.error) if last.error is not None else f"{len(last.images)} picture"


@pytest.fixture
def site(cuda: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An engine process finds the fake device."""
    monkeypatch.setenv("PYTHONPATH", str(SITE))
    return monkeypatch


@pytest.mark.slow
async def test_a_process_that_lost_its_device_is_replaced(site: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site.setenv("FAKE_CUDA_LOST", f"3000:{tmp_path / 'once'}")
    async with ProcessEngineClient({"model": "demo", "device": "cuda", "dtype": "float32"}, warmup=False) as client:
        ended = await asyncio.gather(*(served(client, i) for i in range(3)))
        assert len(ended) == 3 and all("lost its device" in outcome for outcome in ended), ended
        for _ in range(600):
            if client.ready:
                break
            await asyncio.sleep(0.1)
        assert await served(client, 9) == "1 picture"
        assert (await client.stats()).restarts == 1


@pytest.mark.slow
async def test_a_device_that_is_lost_in_the_warm_up_is_told_at_once(site: pytest.MonkeyPatch) -> None:
    site.setenv("FAKE_CUDA_LOST", "900")
    with pytest.raises(OmniError, match="the device is lost"):
        async with ProcessEngineClient({"model": "demo", "device": "cuda", "dtype": "float32"}):
            pass


@pytest.mark.slow
async def test_a_process_that_keeps_losing_its_device_stays_dead(site: pytest.MonkeyPatch) -> None:
    site.setenv("FAKE_CUDA_LOST", "3000")
    options = {"warmup": False, "max_restarts": 1}
    async with ProcessEngineClient({"model": "demo", "device": "cuda", "dtype": "float32"}, **options) as client:
        for i in range(2):
            for _ in range(600):
                if client.ready:
                    break
                await asyncio.sleep(0.1)
            assert "lost its device" in await served(client, i)
        for _ in range(100):
            if "restart the server" in (said := await served(client, 5)):
                break
            await asyncio.sleep(0.1)
        assert "died more than 1 times" in said
