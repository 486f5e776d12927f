"""The harness itself: what it must refuse, count and remember, or nothing that it shows means anything."""

from __future__ import annotations

import copy
import gc
import time

import pytest
import torch

import fake_cuda

pytestmark = [pytest.mark.usefixtures("cuda"), pytest.mark.alone]


def test_devices_do_not_mix() -> None:
    one, two, host = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"), torch.ones(3)
    for act in (lambda: one + two, lambda: one + host, lambda: torch.cat([one, host]), lambda: host[one.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            act()
    assert (one + torch.tensor(2.0)).tolist() == [3.0] * 3  # a scalar of the host may come along
    assert (one + two.to("cuda:0")).device == one.device


def test_an_operation_without_a_kernel_there_is_refused() -> None:
    with torch.library._scoped_library("fake_cuda_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        assert torch.ops.fake_cuda_test.twice(torch.ones(1)).item() == 2
        with pytest.raises(NotImplementedError, match="CUDA"):
            torch.ops.fake_cuda_test.twice(torch.ones(1, device="cuda"))


def test_views_share_memory_and_bytes_are_counted() -> None:
    gc.collect()
    before = fake_cuda.used(0), fake_cuda.used(1)
    whole = torch.zeros(4, 8, device="cuda")
    part = whole[1:3].t()
    part.add_(1)
    out = torch.empty(0, device="cuda:1")
    torch.mul(torch.ones(16, device="cuda:1"), 2, out=out)
    assert whole.sum().item() == 16 and out.sum().item() == 32
    assert (fake_cuda.used(0) - before[0], fake_cuda.used(1) - before[1]) == (whole.nbytes, out.nbytes)
    del whole, part, out
    assert (fake_cuda.used(0), fake_cuda.used(1)) == before


def test_what_launches_nothing_is_no_kernel() -> None:
    x = torch.ones(4, 6, device="cuda")
    fake_cuda.device.kernels.clear()
    copied = copy.deepcopy([x, x])
    assert copied[0] is copied[1] and copied[0].is_cuda and fake_cuda.device.kernels.total() == 1
    x.view(24)[3:].unsqueeze(0).expand(2, -1)
    torch.empty(3, device="cuda")
    x.t().detach()
    assert fake_cuda.device.kernels.total() == 1
    x.add_(1)
    x[0] = 2
    assert fake_cuda.device.kernels.total() == 3


def test_memory_is_short_on_one_device() -> None:
    with fake_cuda.limit(fake_cuda.used(1) + 1000, 1):
        torch.empty(500, device="cuda:0")
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(500, device="cuda:1")
        torch.empty(200, device="cuda:1")


def test_a_lost_device_stays_lost() -> None:
    x = torch.ones(2, device="cuda")
    fake_cuda.device.kernels_left = 2
    x.add_(1)
    for act in (lambda: x.add_(1), lambda: x.add_(1), torch.cuda.synchronize):
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            act()


def test_waits_are_noted() -> None:
    x = torch.ones(4, device="cuda")
    acts = [
        lambda: x.sum().item(), lambda: x.cpu(), lambda: torch.ones(4).to("cuda"), lambda: x[x > 0],
        lambda: x.nonzero(), lambda: torch.equal(x, x), torch.cuda.synchronize, lambda: x[torch.tensor([0])],
    ]  # fmt: skip
    for act in acts:
        with fake_cuda.device.watched() as waits:
            act()
        assert waits and not any(wait.callers for wait in waits)  # only a test asked; indexing by a mask waits twice
    with fake_cuda.device.watched() as waits:
        (x * 2).to(torch.bfloat16)[1:].clone()
        torch.ones(4).to("cuda", non_blocking=True)
    assert waits == []


def test_the_device_runs_behind_the_host() -> None:
    a = torch.ones(64, 64, device="cuda")
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for event in (first, last):  # the first time costs the host more
        event.record()
        a @ a
    torch.cuda.synchronize()
    with fake_cuda.device.clock.at(flops=2 * 64**3 / 0.5, queue=100) as clock:
        began = time.perf_counter()
        first.record()
        a @ a
        a @ a
        last.record()
        assert time.perf_counter() - began < 0.5 and not last.query()
        torch.cuda.synchronize()
        assert last.query() and time.perf_counter() - began >= 0.99
        assert 999 <= first.elapsed_time(last) <= 1e3 * (time.perf_counter() - began)
        assert clock.busy_s == pytest.approx(1.0, rel=0.1)
