"""The tensor operations that are ours: native where `csrc/` was built, the torch twin of the same signature otherwise.

Both accumulate in fp32 and round once. Knows no requests and no plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_omni.logger import init_logger

logger = init_logger(__name__)
LIBRARY = Path(__file__).with_name("libvllm_omni_ops.so")
WHY_NOT = Path(__file__).with_name("not_built.txt")  # written by CMakeLists.txt where it could not build


EIGHT_BITS = torch.float8_e4m3fn


@dataclass(frozen=True)
class Packed:
    """A residual in eight bits: values (n, tokens, channels), and the fp32 scale of each token, (n, tokens, 1)."""

    values: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Residual = torch.Tensor | Packed


def pack(residual: torch.Tensor) -> Packed:
    """In eight bits; `residual` itself is used up. Scaled so that each token's largest value is the format's."""
    largest = torch.linalg.vector_norm(residual, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = (largest / torch.finfo(EIGHT_BITS).max).clamp_min_(torch.finfo(torch.float32).tiny)
    return Packed(residual.div_(scale).to(EIGHT_BITS), scale)


def forecast_torch(
    x: torch.Tensor, residuals: Sequence[Residual], weights: Sequence[float], first_rows: Sequence[int]
) -> torch.Tensor:
    """`forecast` in torch: as few passes as its operators allow."""
    if len(residuals) == 1 and len(residuals[0]) == len(x) and isinstance(residuals[0], torch.Tensor):
        return torch.add(x, residuals[0].to(x.dtype), alpha=weights[0])
    out = x.float() if x.dtype != torch.float32 else x.clone()
    for residual, weight, first in zip(residuals, weights, first_rows, strict=True):
        rows = out[first : first + len(residual)]
        if isinstance(residual, Packed):
            rows.addcmul_(residual.values.to(out.dtype), residual.scale, value=weight)
        else:
            rows.add_(residual, alpha=weight)
    return out.to(x.dtype)


def residual_norm_torch(
    after: torch.Tensor, before: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual_norm` in torch."""
    difference = after.float() - before.float()
    return difference.to(dtype), difference.norm(dim=-1)


def _load() -> str | None:
    """Load the extension; gives the reason where there is none."""
    if not LIBRARY.exists():
        return WHY_NOT.read_text(encoding="utf-8").strip() if WHY_NOT.exists() else "csrc/ was not built"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built for another torch
        return f"{LIBRARY.name} does not load: {error}"
    return None


def forecast(
    x: torch.Tensor, residuals: Sequence[Residual], weights: Sequence[float], first_rows: Sequence[int]
) -> torch.Tensor:
    """x + sum_j w_j r_j: residual j, (n, tokens, channels), is added to rows first_rows[j] and the n - 1 after it.

    x is (rows, tokens, channels) and stays as it is. Residuals may be of another dtype than x, but all of the same.
    Packed ones are unpacked one by one, in torch.
    """
    plain = [residual for residual in residuals if isinstance(residual, torch.Tensor)]
    one = len(plain) == len(residuals) == 1 and len(plain[0]) == len(x) and plain[0].dtype == x.dtype
    if REASON is not None or one or len(plain) < len(residuals):  # torch adds one term in one pass, and faster
        return forecast_torch(x, residuals, weights, first_rows)
    return torch.ops.vllm_omni.forecast(x, plain, weights, first_rows)


def residual_norm(after: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """after - before in `dtype`, (rows, tokens, channels), and the fp32 2-norm of each token of it, (rows, tokens)."""
    if REASON is not None:
        return residual_norm_torch(after, before, dtype)
    return torch.ops.vllm_omni.residual_norm(after, before, dtype)


def residual(after: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> Residual:
    """after - before in `dtype`, rounded once. In the model's own dtype that is one pass of torch."""
    if dtype == EIGHT_BITS:
        return pack(after - before)
    return after - before if dtype == after.dtype else residual_norm(after, before, dtype)[0]


REASON = _load()
if REASON is None:
    torch.library.register_fake("vllm_omni::forecast", lambda x, residuals, weights, first_rows: torch.empty_like(x))
    torch.library.register_fake(
        "vllm_omni::residual_norm",
        lambda after, before, dtype: (
            torch.empty_like(after, dtype=dtype, memory_format=torch.contiguous_format),
            after.new_empty(after.shape[:-1], dtype=torch.float32),
        ),
    )
else:
    logger.info("torch stands in for the native ops: %s", REASON)
