"""The tensor operations of the cache: what a skipped step adds, and what a computed one keeps.

Torch does them, except for the one case in which `csrc/` is faster, if it was built. Both accumulate in fp32 and round
once. Knows no requests and no plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_omni.logger import init_logger

logger = init_logger(__name__)
LIBRARY = Path(__file__).with_name("libvllm_omni_ops.so")
WHY_NOT = Path(__file__).with_name("not_built.txt")  # written by CMakeLists.txt if it could not build
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


def forecast(
    x: torch.Tensor, residuals: Sequence[Residual], weights: Sequence[float], first_rows: Sequence[int]
) -> torch.Tensor:
    """x + sum_j w_j r_j: residual j, (n, tokens, channels), is added to rows first_rows[j] and the n - 1 after it.

    x is (rows, tokens, channels) and stays as it is. Residuals may be of another dtype than x.
    """
    if REASON is None and _native_is_faster(x, residuals):
        return torch.ops.vllm_omni.forecast(x, residuals, weights, first_rows)
    return forecast_torch(x, residuals, weights, first_rows)


def _native_is_faster(x: torch.Tensor, residuals: Sequence[Residual]) -> bool:
    """Several terms, or terms of single rows, in bfloat16 on a CPU; else torch's own sums are as fast or faster."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not residuals:
        return False
    plain = all(isinstance(residual, torch.Tensor) and residual.dtype == x.dtype for residual in residuals)
    return plain and not (len(residuals) == 1 and len(residuals[0]) == len(x))


def residual_norm(after: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """after - before in `dtype`, (rows, tokens, channels), and the fp32 2-norm of each token of it, (rows, tokens)."""
    difference = after.float() - before.float()
    return difference.to(dtype), difference.norm(dim=-1)


def residual(after: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> Residual:
    """after - before in `dtype`, rounded once. In the model's own dtype that is one pass."""
    if dtype == EIGHT_BITS:
        return pack(after - before)
    return after - before if dtype == after.dtype else (after.float() - before.float()).to(dtype)


def _load() -> str | None:
    """Load the extension; returns the reason if there is none."""
    if not LIBRARY.exists():
        return WHY_NOT.read_text(encoding="utf-8").strip() if WHY_NOT.exists() else "csrc/ was not built"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built for another torch
        return f"{LIBRARY.name} does not load: {error}"
    return None


REASON = _load()
if REASON is None:
    torch.library.register_fake("vllm_omni::forecast", lambda x, residuals, weights, first_rows: torch.empty_like(x))
else:
    logger.info("torch stands in for the native forecast: %s", REASON)
