"""Values of the command line that are more than a number or a word: sizes, JSON, cache settings, adapters."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.cache.settings import PRESET_NAMES, DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError, UnknownChoiceError
from vllm_omni.model_folder import no_adapter


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """(width, height) of "64x48"; (None, None) for None."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if match is None:
        raise InvalidValueError("--size", size, "must be WIDTHxHEIGHT, e.g. 1024x768")
    return int(match[1]), int(match[2])


def writable(flag: str, folder: Path) -> Path:
    """The folder, made if need be; InvalidValueError, before there is work to lose, if no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InvalidValueError(flag, str(folder), f"cannot be written to ({error.strerror})") from None


def writable_file(flag: str, file: Path) -> None:
    """InvalidValueError if the file cannot be made; its folder is."""
    if file.is_dir():
        raise InvalidValueError(flag, str(file), "is a folder; name a file")
    writable(flag, file.parent)


def json_object(field: str, text: str, example: str = '{"mag_threshold": 0.12}') -> dict[str, Any]:
    """A JSON object from the command line; InvalidValueError says what is wrong."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidValueError(field, text, f"must be JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidValueError(field, text, f"must be a JSON object, e.g. '{example}'")
    return value


def cache_settings(text: str) -> dict[str, Any]:
    """The value of `--cache-config`, a preset's name or a JSON object, as plain data.

    Checked here, with its profile, so that a typo costs no model load.
    """
    if text in PRESET_NAMES:
        settings = {"preset": text}
    elif re.fullmatch(r"[\w-]+", text):
        raise UnknownChoiceError("--cache-config", text, PRESET_NAMES, ", or a JSON object")
    else:
        settings = json_object("--cache-config", text)
    config = DiffusionCacheConfig.from_dict(settings)
    if config.profile is not None:
        from vllm_omni.diffusion.cache.profile import named_profile

        named_profile(config.profile)
    return settings


def adapter(flag: str, where: str) -> str:
    """The file, folder or hub id of a LoRA adapter; InvalidValueError for what can be none, before a model loads."""
    if fault := no_adapter(where):
        raise InvalidValueError(flag, where, fault)
    return where


def lora_modules(entries: Sequence[str]) -> dict[str, str]:
    """Adapters by name, of `NAME=PATH`."""
    modules = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise InvalidValueError("--lora-modules", entry, "must be NAME=PATH, e.g. ink=/models/ink.safetensors")
        modules[name] = adapter("--lora-modules", path)
    return modules
