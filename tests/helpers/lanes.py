"""What the fast lane keeps of a long list of cases: some of every kind. The others are marked `slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

# One family per kind of architecture: double and single stream, joint with masks, joint with guidance in one batch,
# video with cross-attention, picture tokens behind the latents, additions between blocks, a tail that returns text and
# image together, latents as a list, images with cross-attention, two experts.
KINDS = {
    "FLUX.1", "Qwen-Image", "Stable Diffusion 3", "Wan 2.1", "FLUX.1 Kontext", "FLUX.1 ControlNet", "FLUX.2 klein",
    "Z-Image", "PixArt-Σ", "Wan 2.2 (two experts)",
}  # fmt: skip


def one_of_a_kind(family: Any) -> bool:
    return family.name in KINDS


def lane(cases: Iterable[Any], fast: Callable[[Any], bool]) -> list[Any]:
    """The cases as parameters, slow unless `fast` says otherwise. At least one is fast."""
    cases = list(cases)
    assert any(map(fast, cases)), "the fast lane would leave all of these out"
    return [case if fast(case) else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
