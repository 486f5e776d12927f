"""The environment variables the package reads, each behind a function with its default."""

from __future__ import annotations

import os
from pathlib import Path


def log_level() -> str:
    """VLLM_OMNI_LOG_LEVEL: DEBUG, INFO (default), WARNING or ERROR."""
    level = os.environ.get("VLLM_OMNI_LOG_LEVEL", "INFO").upper()
    return level if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO"


def api_key() -> str | None:
    """VLLM_API_KEY: the key of a server that was given none by `--api-key`; vLLM reads the same. Blank is none."""
    return os.environ.get("VLLM_API_KEY") or None


def profile_folder() -> Path:
    """VLLM_OMNI_PROFILES: where `vllm-omni calibrate` writes and the engine looks (~/.cache/vllm_omni/profiles)."""
    return Path(os.environ.get("VLLM_OMNI_PROFILES") or Path.home() / ".cache" / "vllm_omni" / "profiles")
