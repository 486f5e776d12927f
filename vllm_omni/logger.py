"""One logger tree named `vllm_omni`; level from VLLM_OMNI_LOG_LEVEL, lines or JSON. Knows nothing of what is logged."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import TextIO

from vllm_omni import envs

_LINE = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
_PART = 8  # letters that a private text and an error have in common by more than chance
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # attributes that every record has


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and whatever the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        told |= {"message": record.getMessage()} | {k: v for k, v in vars(record).items() if k not in _OWN}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class JsonStream(io.TextIOBase):
    """A stream whose lines are JSON objects, whoever writes them: other libraries, warnings, the end by an error."""

    def __init__(self, to: TextIO) -> None:
        self._to, self._lock, self._rest = to, threading.Lock(), ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                if line.strip():
                    self._to.write((line if line.startswith('{"time": ') else self._wrapped(line)) + "\n")
        return len(text)

    def flush(self) -> None:
        self._to.flush()

    def fileno(self) -> int:
        return self._to.fileno()

    def _wrapped(self, line: str) -> str:
        record = logging.LogRecord("stderr", logging.WARNING, "", 0, "%s", (line.rstrip(),), None)
        return JsonLines().format(record)


def log_as_json() -> None:
    """Let this process write one JSON object per line, and nothing else, from now on."""
    sys.stdout, sys.stderr = JsonStream(sys.stdout), JsonStream(sys.stderr)
    for handler in logging.getLogger("vllm_omni").handlers:
        handler.setFormatter(JsonLines())
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def logs_json() -> bool:
    """Whether this process does."""
    return isinstance(sys.stderr, JsonStream)


def told(error: BaseException, private: Sequence[str] = ()) -> str:
    """The traceback, without what it repeats of `private` texts, also of a part of one in other letters."""
    text = "".join(traceback.format_exception(error))
    parts = {part for one in map(_lower, private) for part in (one[i : i + _PART] for i in range(len(one)))}
    parts = {part for part in parts if len(part) == _PART} | {_lower(one) for one in private if 2 < len(one) < _PART}
    lengths, lowered, hidden = {len(part) for part in parts}, _lower(text), bytearray(len(text))
    for i in range(len(text)):
        for length in lengths:
            if lowered[i : i + length] in parts:
                hidden[i : i + length] = b"\1" * length
    return re.sub("\0+", "…", "".join("\0" if hide else letter for letter, hide in zip(text, hidden, strict=True)))


def _lower(text: str) -> str:
    """In small letters, one for one."""
    return "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)


def init_logger(name: str) -> logging.Logger:
    """The logger of a module; the first call gives the tree its handler, unless the application set one."""
    root = logging.getLogger("vllm_omni")
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_LINE, "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(envs.log_level())
    return logging.getLogger(name)
