"""The environment variables the package reads, each behind a function with its default."""

from __future__ import annotations

import os


def log_level() -> str:
    """VLLM_OMNI_LOG_LEVEL: DEBUG, INFO (default), WARNING or ERROR."""
    level = os.environ.get("VLLM_OMNI_LOG_LEVEL", "INFO").upper()
    return level if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO"
