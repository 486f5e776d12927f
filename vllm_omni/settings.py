"""The base of every configuration object: frozen, unknown keys refused, errors that name field, value and fix."""

from __future__ import annotations

from collections.abc import Mapping
from re import findall
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_omni.errors import InvalidValueError, UnknownChoiceError, check_keys


class Settings(BaseModel):
    """Keyword-only, immutable, validated settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        check_keys(type(self).__name__, values, type(self).model_fields)
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), InvalidValueError):
                raise cause from None
            field = ".".join(str(part) for part in first["loc"]) or type(self).__name__
            if first["type"] == "literal_error":
                choices = findall("'([^']*)'", first["ctx"]["expected"])
                raise UnknownChoiceError(field, first["input"], choices) from None
            fix = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
            raise InvalidValueError(field, first["input"], fix[0].lower() + fix[1:]) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings of a mapping; `InvalidValueError` for anything else."""
        if not isinstance(values, Mapping):
            raise InvalidValueError(cls.__name__, values, "is made from a dict")
        return cls(**{str(key): value for key, value in values.items()})
