"""The words between engine and scheduler. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple


class Parked(NamedTuple):
    """A request waiting at its denoiser: calls with equal `key` may share a forward; `skips`: it needs no blocks."""

    key: Hashable
    skips: bool
    since: int  # the tick at which it parked
