"""The words between engine and scheduler. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum
from typing import NamedTuple


class StepKind(IntEnum):
    """What a parked call needs, in the order in which they go."""

    SKIP = 0  # a forward without blocks
    PART = 1  # a text encoder, or the VAE's decoder
    COMPUTE = 2  # a forward with all its blocks


class Parked(NamedTuple):
    """A waiting request: calls with equal `key` and `turn` may be made as one."""

    key: Hashable
    turn: StepKind
    since: int  # the tick at which it parked
