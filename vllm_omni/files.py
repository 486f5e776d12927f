"""Files that are there whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, fill: Callable[[Any], Any]) -> None:
    """Make a file of the bytes that `fill` writes; who reads it meanwhile, or interrupts this, meets no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".part", dir=path.parent, delete=False) as file:
        part = Path(file.name)
        try:
            fill(file)
            file.flush()
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
