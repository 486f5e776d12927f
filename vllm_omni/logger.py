"""One logger tree named `vllm_omni`; level from VLLM_OMNI_LOG_LEVEL, lines or JSON. Knows nothing of what is logged."""

from __future__ import annotations

import json
import logging

from vllm_omni import envs

_LINE = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # attributes that every record has


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and whatever the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        told |= {"message": record.getMessage()} | {k: v for k, v in vars(record).items() if k not in _OWN}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def log_as_json() -> None:
    """Write one JSON object per line from now on, unless the application has its own handlers."""
    for handler in logging.getLogger("vllm_omni").handlers:
        handler.setFormatter(JsonLines())


def init_logger(name: str) -> logging.Logger:
    """The logger of a module; the first call gives the tree its handler, unless the application set one."""
    root = logging.getLogger("vllm_omni")
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_LINE, "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(envs.log_level())
    return logging.getLogger(name)
