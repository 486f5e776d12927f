"""What is left out: of the fast lane, where a long list of cases keeps some of every kind and marks the others `slow`;
and of an ordinary run, what only the full set has, because it takes long on two cores and shows little more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

ALL = os.environ.get("VLLM_OMNI_TESTS") == "all"
full_set = pytest.mark.skipif(not ALL, reason="the full set: bash tools/test.sh --full")

# One family per kind of architecture: double and single stream, joint with masks, joint with guidance in one batch,
# video with cross-attention, picture tokens behind the latents, additions between blocks, a tail that returns text and
# image together, latents as a list, images with cross-attention, two experts.
KINDS = {
    "FLUX.1", "Qwen-Image", "Stable Diffusion 3", "Wan 2.1", "FLUX.1 Kontext", "FLUX.1 ControlNet", "FLUX.2 klein",
    "Z-Image", "PixArt-Σ", "Wan 2.2 (two experts)",
}  # fmt: skip


def one_of_a_kind(family: Any) -> bool:
    return family.name in KINDS


def lane(cases: Iterable[Any], fast: Callable[[Any], bool], full: Callable[[Any], bool] | None = None) -> list[Any]:
    """The cases as parameters, slow unless `fast` says otherwise; those of `full` in the full set alone."""
    cases = list(cases)
    assert any(map(fast, cases)), "the fast lane would leave all of these out"
    marks = {id(case): [pytest.mark.slow, *([full_set] if full and full(case) else [])] for case in cases}
    return [case if fast(case) else pytest.param(*_values(case), marks=marks[id(case)]) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
