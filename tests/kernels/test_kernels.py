"""The forecast, native and in torch: values, strides, dtypes, devices, registration, and the build itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from paths import ROOT

from vllm_omni.kernels import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
native = pytest.mark.skipif(ops.REASON is not None, reason=f"native ops: {ops.REASON}")
BF16 = torch.bfloat16


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _exact_forecast(x, residuals, weights, first_rows):
    """In double, row by row, from the definition."""
    out = x.double()
    for r, w, first in zip(residuals, weights, first_rows, strict=True):
        out[first : first + len(r)] += w * r.double()
    return out


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 33), (2, 64, 192), (5, 129, 31)])
def test_forecast_is_the_sum_rounded_once(shape, dtype, kept) -> None:
    rows = shape[0]
    x = _randn(*shape, dtype=dtype)
    residuals = [_randn(*shape, dtype=kept, seed=1), _randn(1, *shape[1:], dtype=kept, seed=2)]
    call = (x, [*residuals, residuals[1]], [1.75, -0.75, 0.3], [0, rows - 1, 0])
    before = x.clone()
    exact = _exact_forecast(*call)
    for function in (ops.forecast, ops.forecast_torch):
        out = function(*call)
        assert out.dtype == dtype and out.shape == x.shape
        error = (out.double() - exact).abs() / exact.abs().clamp_min(1.0)
        assert error.max() <= _tolerance(dtype), function
    assert torch.equal(x, before)
    assert_close(ops.forecast(*call), ops.forecast_torch(*call), roundings=4)


def test_a_row_without_terms_is_unchanged_and_one_term_equals_torch() -> None:
    x, r = _randn(4, 5, 6), _randn(4, 5, 6, seed=1)
    out = ops.forecast(x, [r[:1], r[1:2]], [1.0, 2.0], [2, 2])
    assert torch.equal(out[[0, 1, 3]], x[[0, 1, 3]])
    assert torch.equal(ops.forecast(x, [], [], []), x)
    assert torch.equal(ops.forecast(x, [r], [1.0], [0]), x + r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forecast_takes_tensors_that_are_not_contiguous(dtype) -> None:
    x, r = _randn(2, 33, 14, dtype=dtype).transpose(1, 2), _randn(2, 14, 40, dtype=dtype, seed=1)[..., 3:36]
    assert not x.is_contiguous() and not r.is_contiguous()
    call = ([r, r], [0.5, 0.25], [0, 0])
    assert torch.equal(ops.forecast(x, *call), ops.forecast(x.contiguous(), [r.contiguous()] * 2, *call[1:]))


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_and_its_norm_equal_the_exact_ones(dtype, kept) -> None:
    fused, before = _randn(3, 20, 65, dtype=dtype), _randn(3, 9, 65, dtype=dtype, seed=1)
    after = fused[:, -9:]  # what a tail returns that holds text, too
    exact = after.double() - before.double()
    residual, norm = ops.residual_norm(after, before, kept)
    assert residual.dtype == kept and residual.is_contiguous() and norm.dtype == torch.float32
    assert torch.equal(residual, (after.float() - before.float()).to(kept))
    assert torch.allclose(norm.double(), exact.norm(dim=-1), rtol=1e-5)
    kept_alone = ops.residual(after, before, kept)
    assert kept_alone.dtype == kept
    assert torch.equal(kept_alone, (after.float() - before.float()).to(kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_are_kept(dtype) -> None:
    x = torch.tensor([[[float("inf"), float("nan"), 1.0, -float("inf")] * 9]]).to(dtype)
    zero = torch.zeros_like(x)
    out = ops.forecast(x, [zero, zero], [1.0, 1.0], [0, 0])
    assert torch.equal(out.isnan(), x.isnan()) and torch.equal(out.nan_to_num(), x.nan_to_num())
    residual, norm = ops.residual_norm(x, zero, dtype)
    assert torch.equal(residual.isnan(), x.isnan()) and norm.isnan().all()


@native
def test_mismatched_arguments_are_refused() -> None:
    x, r = _randn(2, 3, 4, dtype=BF16), _randn(2, 3, 4, dtype=BF16)
    forecast = torch.ops.vllm_omni.forecast
    for call in (
        ([r], [1.0, 2.0], [0]),
        ([r], [1.0], [1]),
        ([r], [1.0], [-1]),
        ([r[..., :3]], [1.0], [0]),
        ([r.float()], [1.0], [0]),
        ([r] * 9, [1.0] * 9, [0] * 9),
    ):
        with pytest.raises(RuntimeError, match="forecast"):
            forecast(x, *call)
    with pytest.raises(RuntimeError, match="forecast"):
        forecast(x.float(), [], [], [])


@native
@pytest.mark.filterwarnings("ignore")
def test_the_operations_pass_torchs_own_checks() -> None:
    """torch's own checks: schema, aliasing, and that the fake's shapes, strides and dtypes are the real ones."""
    x, r = _randn(2, 3, 4, dtype=BF16), _randn(1, 3, 4, dtype=BF16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vllm_omni.forecast, (x, [r], [0.5], [1]), test_utils=checks)


@native
def test_only_what_wins_on_a_cpu_runs_natively() -> None:
    """A tensor of another device meets torch's twin, whatever library is loaded: it has no other implementation."""
    x, r, row = (_randn(n, 3, 4, dtype=BF16) for n in (2, 2, 1))
    several, rows, one = ([r, r], [0.5, 0.25], [0, 0]), ([row], [0.5], [1]), ([r], [0.5], [0])
    for call in (several, rows):
        assert "vllm_omni::forecast" in _operators(lambda call=call: ops.forecast(x, *call))
    elsewhere = [r.to("meta")] * 2
    for call in (
        lambda: ops.forecast(x, *one),
        lambda: ops.forecast(x, [], [], []),
        lambda: ops.forecast(x.float(), [r.float()] * 2, *several[1:]),
        lambda: ops.forecast(x.half(), [r.half()] * 2, *several[1:]),
        lambda: ops.forecast(x, [r.float()] * 2, *several[1:]),
        lambda: ops.forecast(x.float(), *several),
        lambda: ops.forecast(x.to("meta"), elsewhere, *several[1:]),
    ):
        assert "vllm_omni::forecast" not in _operators(call)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_tensors_are_added_on_the_gpu() -> None:
    x, r, row = (_randn(n, 3, 4, dtype=BF16, seed=n) for n in (2, 2, 1))
    call = [0.5, 0.25], [0, 1]
    there = ops.forecast(x.cuda(), [r.cuda(), row.cuda()], *call)
    assert there.is_cuda and torch.allclose(there.cpu().float(), ops.forecast(x, [r, row], *call).float(), rtol=2**-7)


def _operators(call: Callable[[], torch.Tensor]) -> set[str]:
    with torch.profiler.profile() as profile:
        call()
    return {event.name for event in profile.events()}


def test_a_computed_step_allocates_one_residual() -> None:
    """And, to be rounded once to fewer bits, one in fp32 for a moment."""
    after, before = _randn(1, 512, 512), _randn(1, 512, 512, seed=1)
    for keep, passing in ((torch.float32, 0), (torch.bfloat16, after.nbytes)):
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = ops.residual(after, before, keep)
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        assert 0 < most <= kept.nbytes + passing + 4096, (keep, most, kept.nbytes)


def test_a_failed_build_is_an_error_only_if_it_is_required(tmp_path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    # An interpreter without torch: -S and -E keep it from finding site-packages.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys._base_executable} -S -E "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for switch, status in (("auto", 0), ("required", 1), ("off", 0)):
        build = tmp_path / switch
        run = subprocess.run(
            [cmake, "-S", source, "-B", build, f"-DVLLM_OMNI_NATIVE={switch}", f"-DPython_EXECUTABLE={python}"],
            capture_output=True,
            text=True,
        )
        assert (run.returncode != 0) == bool(status), run.stderr[-2000:]
        assert "native ops" in run.stderr
        if not status:
            assert "torch does not import" in (reason := (build / "not_built.txt").read_text()) or "off" in reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_residuals_keep_a_scale_per_token(dtype: torch.dtype) -> None:
    """Half a unit of e4m3's three bits at each token's own size, and half the bytes of bfloat16."""
    sizes = torch.logspace(-6, 4, 33) if dtype != torch.float16 else torch.logspace(-2, 3, 33)
    after, before = _randn(2, 33, 64) * sizes[:, None], torch.zeros(2, 33, 64)
    after[0, 3] = 0.0
    after, before = after.to(dtype), before.to(dtype)
    packed = ops.residual(after, before, ops.EIGHT_BITS)
    assert isinstance(packed, ops.Packed) and len(packed) == 2 and packed.nbytes == 2 * 33 * (64 + 4)
    unpacked = packed.values.float() * packed.scale
    bound = 2**-4 * after.float().abs() + 2**-9 * after.float().abs().amax(-1, keepdim=True)
    assert ((unpacked - after.float()).abs() <= bound).all()
    x = _randn(3, 33, 64, dtype=dtype, seed=1)
    out = ops.forecast(x, [packed, ops.pack(after[:1].clone())], [0.5, -0.25], [1, 0])
    exact = _exact_forecast(x, [unpacked, unpacked[:1]], [0.5, -0.25], [1, 0])
    error = (out.double() - exact).abs() / exact.abs().clamp_min(1.0)
    assert out.dtype == dtype and error.max() <= 2 * _tolerance(dtype)
