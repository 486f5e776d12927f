"""Command-line flags made from the fields of a settings class: name, type, default and help are the field's.

A flag that is not given leaves no trace in the parsed arguments, so that a default is written in its field alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vllm_omni.errors import InvalidValueError, did_you_mean
from vllm_omni.settings import Settings

ALSO = {  # names that others have for it
    "max_queued_requests": "--max-num-queued-reqs",
    "data_parallel_size": "-dp",
    "tensor_parallel_size": "-tp",
    "ulysses_degree": "--usp",
    "ring_degree": "--ring",
}


def command_parser(commands: Any, name: str, summary: str, more: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a sub-command; its help shows the summary, what there is more to say, the options, examples."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{more}",
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def flag_of(name: str) -> str:
    """The flag of a field: `request_timeout_s`, in seconds, is `--request-timeout`."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags that the parser's help shows."""
    return set(re.findall("(?<![a-z-])--[a-z][a-z0-9-]+", parser.format_help()))


def unknown_flags(given: Iterable[str], known: Collection[str]) -> str | None:
    """What to say of the first flag that is not known, nor the beginning of one; None if all are."""
    for flag in given:
        if not any(name.startswith(flag) for name in known):
            close = did_you_mean(flag, known, most=1)
            return f"{flag} is not a flag of this command{'; ' if close else ''}{close}"
    return None


def add_flags(group: Any, owner: type[Settings], *names: str, **helps: str) -> None:
    """Add the flags of the fields `names` of `owner` to a group of a parser; of all that have a description, if none.

    `helps` replaces the description of single fields.
    """
    fields = owner.model_fields
    for name in names or [name for name, field in fields.items() if field.description]:
        field = fields[name]
        text = helps.get(name, field.description or "") + _default(field)
        flags = [flag_of(name), *([ALSO[name]] if name in ALSO else [])]
        options = _options(name, field)
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def given(args: argparse.Namespace, owner: type[Settings]) -> dict[str, Any]:
    """What the command line says about fields of `owner`."""
    found = {name: value for name, value in vars(args).items() if name in owner.model_fields and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


@contextmanager
def named_by_flag(*owners: type[Settings], **flags: str) -> Iterator[None]:
    """Let an error about a field of `owners` name its flag instead; `flags` has those with a name of their own."""
    try:
        yield
    except InvalidValueError as error:
        if any(error.field in owner.model_fields for owner in owners):
            raise error.named(flags.get(error.field) or flag_of(error.field)) from None
        raise


def _options(name: str, field: FieldInfo) -> dict[str, Any]:
    """How argparse reads the field. A Literal is checked by the settings, which also know its other spellings."""
    kind = _kind(field)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"metavar": "{" + ",".join(map(str, get_args(kind))) + "}"}
    if kind in (int, float):
        return {"type": kind, "metavar": "SECONDS" if name.endswith("_s") else "N"}
    word = name.rpartition("_")[2].upper()
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": word.removesuffix("S")}
    if get_origin(kind) is dict and get_args(kind)[1] is Any:
        return {"metavar": "JSON"}
    if get_origin(kind) is dict:
        return {"nargs": "+", "metavar": "NAME=PATH"}
    return {"metavar": "FOLDER" if kind is Path else word}


def _kind(field: FieldInfo) -> Any:
    """The field's type without "or None"."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(field.annotation) else field.annotation


def _default(field: FieldInfo) -> str:
    """The default as the help shows it; nothing if it is None or empty, which the description explains."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return f" (default: {'yes' if value else 'no'})"
    if value is None or value in ((), {}):
        return ""
    return f" (default: {value:g})" if isinstance(value, float) else f" (default: {value})"
