"""The environment variables the package reads, each behind a function with its default."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

from vllm_omni.errors import InvalidValueError

SPINS = 30_000  # rounds of GNU's OpenMP before an idle thread sleeps (docs/log.md)


def log_level() -> str:
    """VLLM_OMNI_LOG_LEVEL: DEBUG, INFO (default), WARNING or ERROR."""
    level = os.environ.get("VLLM_OMNI_LOG_LEVEL", "INFO").upper()
    return level if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO"


def api_key() -> str | None:
    """VLLM_API_KEY: the key of a server that was given none by `--api-key`; vLLM reads the same. Blank is none.

    Without the blanks around it: a file that it is read from ends with a newline.
    """
    return os.environ.get("VLLM_API_KEY", "").strip() or None


def http_keep_alive_s() -> int | None:
    """VLLM_HTTP_TIMEOUT_KEEP_ALIVE: seconds that a connection may wait for its next request; vLLM reads the same."""
    text = os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE") or None
    if text is not None and not re.fullmatch("[0-9]{1,9}", text):
        raise InvalidValueError("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", text, "must be a whole number of seconds")
    return None if text is None else int(text)


def profile_folder() -> Path:
    """VLLM_OMNI_PROFILES: where `vllm-omni calibrate` writes and the engine looks (~/.cache/vllm_omni/profiles)."""
    return Path(os.environ.get("VLLM_OMNI_PROFILES") or Path.home() / ".cache" / "vllm_omni" / "profiles")


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """OMP_WAIT_POLICY or GOMP_SPINCOUNT: how idle OpenMP threads wait. Unless one is set, they spin briefly.

    Threads that sleep at once make small operations half as quick on a quiet machine; threads that spin take the cores
    of whoever else has work, so that `engine/waiting.py` lets them sleep where there is somebody.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def grow_segments(environment: MutableMapping[str, str]) -> None:
    """PYTORCH_ALLOC_CONF, or PYTORCH_CUDA_ALLOC_CONF: how torch keeps a device's memory. Unless one is set, in segments
    that grow: batches of many sizes leave no gaps that none of them fits into.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
