"""LoRA adapters on the pipeline: loaded once by name, switched between batches. diffusers and PEFT do the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_omni.errors import InvalidValueError, ModelLoadError
from vllm_omni.inputs.lora import Adapters


class AdapterSwitch:
    """The adapters a pipeline has, and which of them are on. Switching walks all modules: it is done on change only."""

    def __init__(self, pipeline: Any, modules: Mapping[str, str]) -> None:
        self._pipeline = pipeline
        self._names = tuple(modules)
        self._active: Adapters = ()
        for name, where in modules.items():
            _load(pipeline, name, where)
        if self._names:
            pipeline.disable_lora()

    def check(self, adapters: Adapters) -> None:
        """InvalidValueError for a name that was not registered at start-up."""
        for name, _ in adapters:
            if name not in self._names:
                known = f"must be one of: {', '.join(self._names)}" if self._names else "is not known: none is loaded"
                raise InvalidValueError("lora_request", name, f"{known} (registered with lora_modules at start-up)")

    def use(self, adapters: Adapters) -> None:
        """Turn exactly these adapters on; they stay on until another set is asked for."""
        if adapters == self._active:
            return
        if adapters:
            if not self._active:
                self._pipeline.enable_lora()
            self._pipeline.set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])
        else:
            self._pipeline.disable_lora()
        self._active = adapters

    def close(self) -> None:
        """Take every adapter off the pipeline again."""
        if self._names:
            self._pipeline.unload_lora_weights()
            self._names, self._active = (), ()


def _load(pipeline: Any, name: str, where: str) -> None:
    from diffusers.loaders.lora_base import LoraBaseMixin
    from safetensors import SafetensorError

    path = Path(where).expanduser()
    local = path.exists()
    if not local and (where.count("/") != 1 or where.startswith((".", "/", "~"))):
        raise ModelLoadError(f"lora_modules {name!r}: {where!r} does not exist; give a file, a folder or a hub id")
    if local and path.is_file() and path.suffix != ".safetensors":
        raise ModelLoadError(
            f"lora_modules {name!r}: {path.name} is no .safetensors file; other formats can run code"
        )
    if not isinstance(pipeline, LoraBaseMixin):
        raise ModelLoadError(f"lora_modules {name!r}: {type(pipeline).__name__} takes no LoRA adapters")
    try:
        pipeline.load_lora_weights(str(path) if local else where, adapter_name=name, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelLoadError(f"lora_modules {name!r}: could not be loaded: {error}") from error
