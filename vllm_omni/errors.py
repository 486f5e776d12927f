"""Every error a user of the package can meet.

OmniError
├── InvalidValueError (ValueError)      a field, its value, and what would be right
│   ├── UnknownKeyError                 a name nobody knows, with the close matches
│   └── UnknownChoiceError              a value that is not among the choices, with the close matches
├── ModelLoadError (ValueError)         a model folder that cannot be served
├── RequestAbortedError                 the request was ended by its owner
├── DeadlineExceededError               its time-out ended the request
├── NumericalError                      a result that holds NaN; that request alone fails
├── QueueFullError                      no room to wait; says when to come back
├── EngineDrainingError                 the engine is shutting down and takes nothing new
├── EngineDeadError                     the engine's process died or hangs; it is being restarted
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

    def __init__(self, field: str, value: Any, fix: str, hint: str = "") -> None:
        self.field, self.value, self.fix, self.hint = field, value, fix, hint
        super().__init__(f"{field} {fix}, got {_short(value)}{hint}")

    def named(self, field: str) -> InvalidValueError:
        """The same about `field`, the name that the caller knows it by."""
        return InvalidValueError(field, self.value, self.fix, self.hint)


class UnknownKeyError(InvalidValueError):
    """A key that `owner` does not have."""

    def __init__(self, owner: str, key: str, known: Iterable[str]) -> None:
        names = sorted(known)
        hint = did_you_mean(key, names) or f"it has: {', '.join(names)}"
        self.field, self.value, self.fix, self.hint = key, key, f"is not a field of {owner}", hint
        OmniError.__init__(self, f"{owner} has no {key!r}; {hint}")


class UnknownChoiceError(InvalidValueError):
    """A value that is none of `choices`; `more` says what else is taken."""

    def __init__(self, field: str, value: Any, choices: Iterable[str], more: str = "") -> None:
        names = list(choices)
        fix = f"must be one of {', '.join(map(repr, names))}{more}"
        close = did_you_mean(str(value).lower(), names, most=1)
        super().__init__(field, value, fix, f"; {close}" if close else "")


class ModelLoadError(OmniError, ValueError):
    """The model folder is missing, incomplete, unsafe or of an unknown kind."""


class RequestAbortedError(OmniError):
    """The request was aborted between two steps."""


class DeadlineExceededError(OmniError):
    """The request did not end within its `timeout_s`; it was ended within one step of that."""


class NumericalError(OmniError):
    """The model's result holds NaN: a number overflowed its data type on the way. The request ends without pictures."""

    def __init__(self) -> None:
        super().__init__("numerical_error: the result holds NaN; other settings, or a wider --dtype, may help")


class QueueFullError(OmniError):
    """As many requests wait as the engine lets wait; the planned cost of what is queued says when to come back."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        self.waiting, self.retry_after_s = waiting, retry_after_s
        super().__init__(f"{waiting} requests wait already; come back in {retry_after_s:.0f} s")


class EngineDrainingError(OmniError):
    """The engine is shutting down: it ends what it has and takes nothing new."""


class EngineDeadError(OmniError):
    """The engine's process died or does not answer. Its requests were ended; it is being restarted.

    `retry_after_s`: when it should be back, where that can be said.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineClosedError(OmniError, RuntimeError):
    """The engine has been closed."""


def did_you_mean(word: str, names: Iterable[str], most: int = 3) -> str:
    """The question "did you mean 'a' or 'b'?" about the names close to `word`; empty if none is."""
    close = get_close_matches(word, list(names), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_keys(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UnknownKeyError` for the first key of `given` that is not in `known`."""
    known = set(known)
    for key in given:
        if key not in known:
            raise UnknownKeyError(owner, key, known)
