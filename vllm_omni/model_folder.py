"""A model by name: ``demo``, a folder, a hub id, or a function; and what is wrong with it. safetensors only."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_omni.errors import ModelLoadError

ASSETS = Path(__file__).resolve().parent / "assets"
# What diffusers, PEFT and safetensors raise about files that lack what they are asked for.
UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)
_FUNCTION = re.compile(r"([A-Za-z_]\w*)((?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if (folder / "model_index.json").is_file())


def resolve_model(model: str) -> str:
    """A folder for a shipped name or a path; other names stay as they are. ModelLoadError for what can be none."""
    if model in shipped_models():
        return str(ASSETS / model)
    if (function := _FUNCTION.fullmatch(model)) is not None:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        if function[1] not in sys.modules and importlib.util.find_spec(function[1]) is None:
            raise ModelLoadError(f"model {model!r}: there is no module {function[1]!r} here or on PYTHONPATH")
        return model
    folder = Path(os.path.expanduser(model))  # unlike Path's own, it raises for no name
    if os.path.isdir(folder):
        check_folder(folder)
        return str(folder)
    if os.path.exists(folder):
        raise ModelLoadError(f"model {model!r} is a file; give the folder that holds model_index.json")
    looks_like_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        names = ", ".join(shipped_models())
        fix = f"give a diffusers folder, a hub id, or one of: {names}; or module:function, which makes a pipeline"
        raise ModelLoadError(f"model {model!r} does not exist; {fix}")
    return model


def made_by_function(model: str) -> Any:
    """What the operator's own ``module:function`` returns: a pipeline. None for a model of another kind.

    Its code runs, as that of any program that is started; no folder and no client can name one.
    """
    function = _FUNCTION.fullmatch(model)
    if function is None:
        return None
    try:
        make = vars(importlib.import_module(function[1] + function[2]))[function[3]]
    except ImportError as error:
        raise ModelLoadError(f"model {model!r} could not be imported: {error}") from error
    except KeyError:
        raise ModelLoadError(f"model {model!r}: the module has no {function[3]!r}") from None
    return make()


def no_adapter(where: str) -> str:
    """Why no LoRA adapter can be at that file, folder or hub id, as far as the name shows; "" if one can."""
    local = os.path.exists(path := os.path.expanduser(where))
    if not local and (where.count("/") != 1 or where.startswith((".", "/", "~"))):
        return "does not exist; give a file, a folder or a hub id"
    if os.path.isfile(path) and not path.endswith(".safetensors"):
        return "is no .safetensors file; other formats can run code"
    return ""


def check_folder(folder: Path) -> None:
    """Refuse, before any weight loads, a folder that is incomplete, truncated, or would need pickle."""
    index = _read_json(folder / "model_index.json")
    for name, entry in index.items():
        if name.startswith("_") or not (isinstance(entry, list) and len(entry) == 2) or entry[0] is None:
            continue
        part = folder / name
        if Path(name).name != name:
            raise ModelLoadError(f"{folder}: model_index.json names {name!r}, which is outside the folder")
        if not part.is_dir():
            raise ModelLoadError(f"{folder}: model_index.json names {name!r}, but there is no such folder")
        weights = [f for f in part.iterdir() if f.name.endswith(".safetensors")]
        pickled = [f.name for f in part.iterdir() if f.suffix in _PICKLED]
        if pickled and not weights:
            raise ModelLoadError(f"{part}: {pickled[0]} is pickled, which can run code; convert it to safetensors")
        if not weights and (part / "config.json").is_file():
            raise ModelLoadError(f"{part}: holds a config.json but no .safetensors weights")
        for file in weights:
            check_safetensors(file)
        for file in part.glob("*.index.json"):
            _check_shards(file)


def _check_shards(file: Path) -> None:
    """Shards are safetensors beside their index: what else it names would be read, or unpickled."""
    named = _read_json(file).get("weight_map")
    for name in set(map(str, named.values())) if isinstance(named, dict) else ("no weight_map",):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{file}: names {name!r}, which is no .safetensors file beside it")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelLoadError(f"{file.parent}: has no {file.name}; is it a diffusers model folder?")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file}: is not complete JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file}: must hold a JSON object")
    return content


def check_safetensors(file: Path) -> None:
    """That the header is whole and covers the file, by the library that will read it."""
    if not file.is_file():  # a link to nothing, or a pipe
        raise ModelLoadError(f"{file}: is no file; copy it again")
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file}: is truncated, or not a safetensors file ({error}); copy it again") from None


def generation_defaults(model: str) -> dict[str, Any]:
    """The model's own defaults for the pipeline's call, from `generation_config.json` in its folder."""
    file = Path(resolve_model(model)) / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


def captions(model: str) -> list[str]:
    """What the model itself says that it can draw: the lines of `captions.txt` in its folder; [] if there is none."""
    try:
        file = Path(resolve_model(model)) / "captions.txt"
        return [line for text in file.read_text(encoding="utf-8").splitlines() if (line := text.strip())]
    except (OSError, UnicodeDecodeError, ModelLoadError):
        return []
