"""Log lines as JSON, in the front end and in the engine process alike."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

from vllm_omni import envs


def log_as_json() -> None:
    """From now on one JSON object per line; what a record was given as `extra` are fields of it."""
    root = logging.getLogger("vllm_omni")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root.handlers, root.propagate = [handler], False
    root.setLevel(envs.log_level())
