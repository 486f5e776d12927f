"""What ranks have to do with accelerators: which of them are seen, attention kernels, and who has failed where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trap_models as traps
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from process_client import gone
from torch._subclasses import FakeTensorMode
from waiting import until

from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.prove import NO_ROOM, NO_ROOM_FOR_TWO
from vllm_omni.distributed.config import ParallelConfig
from vllm_omni.distributed.lockstep import told
from vllm_omni.distributed.peers import Peers
from vllm_omni.distributed.setup import RING_KERNEL, give_ring_kernel, split
from vllm_omni.errors import DeviceLostError, InvalidValueError

RING, REGISTRY = ParallelConfig(ring_degree=2), attention_dispatch._AttentionBackendRegistry
ORDER = """
import os, sys, torch

def asked(*args):
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    os._exit(0)

torch.cuda.is_available = torch.cuda._lazy_init = asked
torch.cuda.device_count = lambda: 4  # as NVML says, which initialises nothing
from vllm_omni.engine.process import _load
from vllm_omni.engine.wire import Start
_load(Start({"model": "demo", "cfg_parallel_size": 2}, False, 1.0, replica=1, replicas=2), None)
"""
STOPPED = """
import os, signal
from vllm_omni.engine.parent import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.slow
def test_an_engine_sees_its_own_devices_before_anything_asks_cuda() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", ORDER], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2,3\n", done.stderr


def test_a_stopped_process_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, STOPPED], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.send_signal(signal.SIGKILL)
        until(lambda: gone(child))


@pytest.fixture(autouse=True)
def usual_kernel() -> Iterator[None]:
    """Whatever another model in this process was given."""
    with attention_dispatch.attention_backend("native"):
        yield


def flux(dtype: torch.dtype) -> Any:
    """A small model on a CUDA device whose tensors have shapes and no numbers."""
    with torch.device("meta"):
        module = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
        module.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return module.to_empty(device="cuda")


def kernels_of(module: Any) -> set[Any]:
    found = [part.processor for part in module.modules() if isinstance(part, AttentionModuleMixin)]
    assert found
    return {processor._attention_backend for processor in found}


def test_a_ring_has_a_kernel_that_returns_its_sums() -> None:
    module, active = flux(torch.bfloat16), REGISTRY.get_active_backend()[0]
    assert kernels_of(module) == {None} and active == "native"
    give_ring_kernel(module, RING)
    assert kernels_of(module) == {RING_KERNEL} and REGISTRY.get_active_backend()[0] == active
    assert RING_KERNEL in REGISTRY._supports_context_parallel
    query = torch.empty(1, 6, 2, 16, dtype=torch.bfloat16, device="meta")
    out, sums = attention_dispatch._native_flash_attention_forward_op(
        None, query, query, query, return_lse=True, _save_ctx=False
    )
    assert (out.shape, sums.shape) == (query.shape, query.shape[:3])
    with pytest.raises(ValueError, match="return_lse"):
        attention_dispatch._native_attention_forward_op(None, query, query, query, return_lse=True, _save_ctx=False)


def test_a_ring_has_the_kernel_that_was_asked_for_if_that_returns_its_sums() -> None:
    module = flux(torch.bfloat16)
    with attention_dispatch.attention_backend("_native_cudnn"):
        module.set_attention_backend("_native_cudnn")
        give_ring_kernel(module, RING)
    assert kernels_of(module) == {"_native_cudnn"}


def test_a_ring_whose_kernel_cannot_be_had_is_refused_at_load() -> None:
    with pytest.raises(InvalidValueError, match=r"ring_degree must be 1 with .* native.*float32.*--dtype bfloat16"):
        split(flux(torch.float32), RING)


def test_a_failure_after_another_number_of_exchanges_is_another(tmp_path: Path) -> None:
    """Accelerators make exchanges later than they are asked for: ranks that have asked for more would wait for them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'met'}", rank=0, world_size=1)
    try:
        some, number = dist.new_group([0]), torch.zeros(1)
        before = told(torch.OutOfMemoryError("CUDA out of memory. GPU 0"))
        assert told(torch.OutOfMemoryError("CUDA out of memory. GPU 1")) == before != told(ValueError("bad"))
        seen = {before}
        for exchange in (
            lambda: dist.all_reduce(number),
            lambda: dist.all_gather([torch.zeros(1)], number, group=some),
            lambda: dist.broadcast(number, 0),
            lambda: dist.all_to_all_single(torch.zeros(1), number, group=some),
        ):
            exchange()
            seen.add(told(torch.OutOfMemoryError("CUDA out of memory. GPU 0")))
        assert len(seen) == 5
    finally:
        dist.destroy_process_group()


class Short(traps.Plain):
    """Has no room in its call of a number, from 0 on, or for more than one row."""

    def __init__(self) -> None:
        super().__init__()
        self.short_at, self.calls, self.rows = -1, [0], 2

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        if self.calls[0] > self.short_at >= 0 or len(noisy) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(noisy, when)


@pytest.mark.parametrize(("short_at", "rows", "reason"), [(0, 2, NO_ROOM), (3, 2, NO_ROOM), (-1, 1, NO_ROOM_FOR_TWO)])
def test_a_rank_that_alone_has_no_room_to_examine_a_model_ends_the_group(short_at: int, rows: int, reason: str) -> None:
    call = traps.call_of()
    for alike in (True, False):
        model = traps.made(Short)
        model.short_at, model.rows = short_at, rows
        denoiser = Denoiser(model)
        peers = Peers(1, ParallelConfig(ulysses_degree=2), torch.device("cpu"), lambda error, alike=alike: alike)
        denoiser.guarded = peers.guarded
        if alike:
            denoiser.learn(call, lambda given, model=model: model(**given))
            assert reason in denoiser.findings[denoiser.kind_of(call)].reason
        else:
            with pytest.raises(DeviceLostError, match="rank 1 failed alone: OutOfMemoryError"):
                denoiser.learn(call, lambda given, model=model: model(**given))


def test_what_rank_0_has_found_of_a_model_all_ranks_know() -> None:
    first, other = (Denoiser(traps.made(traps.Plain)) for _ in range(2))
    call = traps.call_of()
    first.learn(call, lambda given: first.module(**given))
    other.believe(first.found)
    assert other.findings == first.findings != {} and other.stack_for(call) is not None
    other.believe(Denoiser(traps.made(traps.Twice)).found)
    assert other.findings == {} and other.stack_for(call) is None
