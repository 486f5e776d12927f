"""Waiting on a condition instead of for so many seconds, with an end that only a hang meets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 60.0, pause_s: float = 0.01) -> Any:
    """What the condition gives at last."""
    end = time.monotonic() + seconds
    while not (told := condition()):
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(pause_s)
    return told
