"""Every error a user of the package can meet.

OmniError
├── InvalidValueError (ValueError)      a field, its value, and what would be right
│   ├── RefusedError                    what the model's own pipeline says against a request, before its first step
│   ├── UnknownKeyError                 an unknown name, with the close matches
│   ├── UnknownChoiceError              a value that is not among the choices, with the close matches
│   └── UnknownAdapterError             an adapter that is not loaded
├── ModelLoadError (ValueError)         a model folder that cannot be served
├── RequestAbortedError                 the request was ended by its owner
├── DeadlineExceededError               its time-out ended the request
├── NumericalError                      a result that holds NaN; that request alone fails
├── QueueFullError                      no room to wait; with the time to retry
├── ConflictError                       what is asked does not fit the state that the engine is in
├── EngineAsleepError                   the engine sleeps, or is about to, and takes no requests
├── EngineDrainingError                 the engine is shutting down and takes nothing new
├── DeviceMemoryError                   the device has no room for the request even alone; with what would fit
├── EngineDeadError                     the engine died, hangs, or stayed in the process this one was forked from
│   └── DeviceLostError                 its device fails in every call; only another process can use it again
└── EngineClosedError (RuntimeError)    a call after close()
"""

from __future__ import annotations

import linecache
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from reprlib import Repr
from traceback import walk_stack, walk_tb
from typing import Any

_SHOWN = 120
_PLAIN = (type(None), bool, int, float, str)
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _SHOWN
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 16


class OmniError(Exception):
    """Base of all errors raised on purpose by this package. They can be copied and pickled with all they say."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args), vars(self)


class InvalidValueError(OmniError, ValueError):
    """A value out of its range: `field`, `value`, and a message with the fix.

    `value` is the value itself if it is a short text or a number, else what the message shows of it.
    """

    def __init__(self, field: str, value: Any, fix: str, hint: str = "") -> None:
        shown = _short(value)
        self.field, self.value = field, shown if type(value) not in _PLAIN or shown.endswith("...") else value
        self.fix, self.hint = fix, hint
        super().__init__(f"{field} {fix}, got {shown}{hint}")

    def named(self, field: str) -> InvalidValueError:
        """The same about `field`, the name that the caller knows it by."""
        return InvalidValueError(field, self.value, self.fix, self.hint)


class RefusedError(InvalidValueError):
    """A request that the model's own pipeline refuses before its first step; `field` is the argument that it names."""

    def __init__(self, field: str, text: str) -> None:
        self.field, self.value, self.fix, self.hint = field, None, f"is refused by the model's pipeline: {text}", ""
        OmniError.__init__(self, f"{field} {self.fix}")


class UnknownKeyError(InvalidValueError):
    """A key that `owner` does not have."""

    def __init__(self, owner: str, key: str, known: Iterable[str]) -> None:
        names = sorted(known)
        hint = did_you_mean(key, names) or f"it has: {', '.join(names)}"
        self.field = self.value = key[:_SHOWN]
        self.fix, self.hint = f"is not a field of {owner}", hint
        OmniError.__init__(self, f"{owner} has no {_short(key)}; {hint}")


class UnknownChoiceError(InvalidValueError):
    """A value that is none of `choices`; `more` says what else is taken."""

    def __init__(self, field: str, value: Any, choices: Iterable[str], more: str = "") -> None:
        names = list(choices)
        fix = f"must be one of {', '.join(map(repr, names))}{more}"
        close = did_you_mean(str(value).lower(), names, most=1)
        super().__init__(field, value, fix, f"; {close}" if close else "")


class UnknownAdapterError(InvalidValueError):
    """An adapter of that name is not loaded."""


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
    """As many requests wait as may wait; `retry_after_s` follows from the planned cost of what is queued."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        self.waiting, self.retry_after_s = waiting, retry_after_s
        super().__init__(f"{waiting} requests are already waiting; retry in {retry_after_s:.0f} s")


class ConflictError(OmniError):
    """The engine is in a state in which this cannot be done: it sleeps, is full, or does it already."""


class EngineAsleepError(OmniError):
    """The engine sleeps, or will as soon as its requests have ended; `wake_up` ends that."""

    retry_after_s = 5.0

    def __init__(self) -> None:
        super().__init__("the engine is asleep and takes no requests; wake it up")


class StoreError(OmniError):
    """What the server keeps in files cannot be read or written at the moment."""


class EngineDrainingError(OmniError):
    """The engine is shutting down: it ends what it has and takes nothing new."""


class EngineDeadError(OmniError):
    """The engine died or does not answer, and its requests were ended; or it belongs to another process.

    `retry_after_s`: when it should be back, if a server is restarting it.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeviceLostError(EngineDeadError):
    """The device reports an error after which every call fails, such as an illegal memory access."""


class DeviceMemoryError(OmniError):
    """The request does not fit on the device, although everything else made room for it."""


class EngineClosedError(OmniError, RuntimeError):
    """The engine has been closed."""


def refusal(error: Exception, arguments: Mapping[str, Any]) -> Exception:
    """What a pipeline raised on purpose about its arguments, as a RefusedError; any other error as it is."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if not isinstance(error, ValueError) or isinstance(error, OmniError) or place is None:
        return error
    code, line = place.tb_frame.f_code, linecache.getline(place.tb_frame.f_code.co_filename, place.tb_lineno)
    if not line.lstrip().startswith("raise") or f"{os.sep}diffusers{os.sep}" not in code.co_filename:
        return error
    named = [(found.start(), name) for name in arguments if (found := re.search(rf"(?i)\b{name}\b", str(error)))]
    return RefusedError(max(named)[1] if named else "prompt", str(error))


def _restored(kind: type[OmniError], args: tuple[Any, ...]) -> OmniError:
    """An error as it was, without its constructor, whose arguments are another matter than the text they made."""
    return kind.__new__(kind, *args)


def did_you_mean(word: str, names: Iterable[str], most: int = 3, alike: float = 0.5) -> str:
    """The question "did you mean 'a' or 'b'?" about names that are `alike` at least (1: equal); empty if none is."""
    close = get_close_matches(word, list(names), n=most, cutoff=alike)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def _short(value: Any) -> str:
    """At most `_SHOWN` characters; of something large, only those are made."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # more digits than Python writes out
        text = f"{type(value).__name__} of too many digits..."
    return text if len(text) < _SHOWN else text[: _SHOWN - 3] + "..."


def forget_locals(error: BaseException | None) -> None:
    """Drop what the frames of a caught error hold: the tensors of a request would live as long as its error is kept.

    Its traceback still shows every line. Frames that still run are left alone.
    """
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            for caller, _ in walk_stack(frame):
                with suppress(RuntimeError):
                    caller.clear()
        error = error.__context__


def check_keys(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UnknownKeyError` for the first key of `given` that is not in `known`."""
    known = set(known)
    for key in given:
        if key not in known:
            raise UnknownKeyError(owner, str(key), known)
