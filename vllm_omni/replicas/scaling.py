"""How many replicas there should be, from what is left to do. Pure; the simulator and Ray Serve's policy use it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field


def wanted_replicas(left_s: float, target_s: float, lowest: int, highest: int) -> int:
    """As many as leave each `target_s` seconds of work, if it had the engine to itself, within the bounds."""
    return min(highest, max(lowest, math.ceil(left_s / target_s)))


@dataclass
class Window:
    """What was wanted of late: more replicas come at once, fewer only if so few were wanted for `patience_s`.

    Work comes and goes by the second, and an engine takes many seconds to start.
    """

    patience_s: float
    wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def note(self, now: float, wanted: int) -> int:
        """How many there should be, now that `wanted` are."""
        self.wanted.append((now, wanted))
        while self.wanted[0][0] < now - self.patience_s:
            self.wanted.popleft()
        return max(number for _, number in self.wanted)
