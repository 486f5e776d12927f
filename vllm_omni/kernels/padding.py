"""Texts of unlike lengths, brought to one. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad


def padded(
    texts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], multiple: int = 1
) -> tuple[list[Any], list[Any]]:
    """(texts, masks) at the length of the longest, or the next `multiple`; None for masks where nothing is left out."""
    longest = -(-max(text.shape[1] for text in texts) // multiple) * multiple
    if all(mask is None for mask in masks) and all(text.shape[1] == longest for text in texts):
        return list(texts), [None] * len(texts)
    dtype = next((mask.dtype for mask in masks if mask is not None), torch.bool)
    whole = [
        torch.ones(text.shape[:2], dtype=dtype, device=text.device) if mask is None else mask.to(dtype)
        for text, mask in zip(texts, masks, strict=True)
    ]
    gaps = [longest - text.shape[1] for text in texts]
    filled = [pad(text, (0, 0, 0, gap)) for text, gap in zip(texts, gaps, strict=True)]
    return filled, [pad(mask, (0, gap)) for mask, gap in zip(whole, gaps, strict=True)]
