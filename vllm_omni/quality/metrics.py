"""How far pictures are from the uncached ones, pair by pair. torchmetrics does the arithmetic."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from vllm_omni.errors import InvalidValueError

CEILING_DB = 100.0  # identical pictures have no finite PSNR


def compare(pictures: np.ndarray, reference: np.ndarray) -> dict[str, list[float]]:
    """`psnr` (dB, float pictures, at most 100), `ssim` and, where its weights are to be had, `lpips`, one per pair.

    Arrays of (pairs, [frames,] height, width, 3) in [0, 1]. A video's frames count as one picture for PSNR and are
    averaged for the others.
    """
    functional = _torchmetrics().functional.image
    given, wanted = _batched(pictures), _batched(reference)
    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    model, _ = lpips()
    if model is not None:
        found["lpips"] = []
    for a, b in zip(given, wanted, strict=True):  # (frames, 3, height, width)
        psnr = functional.peak_signal_noise_ratio(a, b, data_range=1.0)
        found["psnr"].append(min(float(psnr), CEILING_DB))
        found["ssim"].append(float(functional.structural_similarity_index_measure(a, b, data_range=1.0)))
        if model is not None:
            found["lpips"].append(float(model(a.float(), b.float())))
    return found


@cache
def lpips() -> tuple[Any, str]:
    """(the network, "") or (None, why there is none): its AlexNet weights are a download, which may not be possible."""
    _torchmetrics()
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval(), ""
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return None, f"LPIPS is left out: its network cannot be had here ({type(error).__name__}: {reason})"


def _batched(pictures: np.ndarray) -> torch.Tensor:
    """(pairs, frames, 3, height, width) in float64, so that the metric's own rounding does not show."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).double()
    if tensor.ndim == 4:
        tensor = tensor[:, None]
    return tensor.movedim(-1, -3)


def _torchmetrics() -> Any:
    try:
        import torchmetrics.functional.image
    except ImportError:
        fix = "must be installed for a quality report: pip install 'vllm-omni-magcache[quality]'"
        raise InvalidValueError("torchmetrics", "absent", fix) from None
    return torchmetrics
