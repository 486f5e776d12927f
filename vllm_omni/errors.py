"""Every error a user of the package can meet.

OmniError
├── InvalidValueError (ValueError)      a field, its value, and what would be right
│   └── UnknownKeyError                 a name nobody knows, with the close matches
├── ModelLoadError (ValueError)         a model folder that cannot be served
├── RequestAbortedError                 the request was ended by its owner
└── EngineClosedError (RuntimeError)    a call after close()
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class OmniError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidValueError(OmniError, ValueError):
    """A value out of its range: `field`, `value`, and a message that says how to mend it."""

    def __init__(self, field: str, value: Any, fix: str) -> None:
        self.field, self.value = field, value
        super().__init__(f"{field} {fix}, got {_short(value)}")


class UnknownKeyError(InvalidValueError):
    """A key that `owner` does not have."""

    def __init__(self, owner: str, key: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(key, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has: {', '.join(names)}"
        self.field, self.value = key, key
        OmniError.__init__(self, f"{owner} has no {key!r}; {hint}")


class ModelLoadError(OmniError, ValueError):
    """The model folder is missing, incomplete, unsafe or of an unknown kind."""


class RequestAbortedError(OmniError):
    """The request was aborted between two steps."""


class EngineClosedError(OmniError, RuntimeError):
    """The engine has been closed."""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_keys(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UnknownKeyError` for the first key of `given` that is not in `known`."""
    known = set(known)
    for key in given:
        if key not in known:
            raise UnknownKeyError(owner, key, known)
