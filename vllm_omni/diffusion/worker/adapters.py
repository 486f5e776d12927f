"""LoRA adapters on the pipeline: loaded once by name, switched between batches. diffusers and PEFT do the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from vllm_omni.diffusion.denoiser.lora_scales import asked_scales
from vllm_omni.diffusion.denoiser.specs import denoisers_of
from vllm_omni.errors import InvalidValueError, ModelLoadError
from vllm_omni.inputs.lora import Adapters
from vllm_omni.kernels.placement import take_turns
from vllm_omni.model_folder import UNREADABLE, no_adapter


class AdapterSwitch:
    """The adapters a pipeline has, and which of them are on. Switching walks all modules: it is done on change only.

    Those that are on before the first of ours comes are the caller's own: they stay on, at their scales, in every
    request.
    """

    def __init__(self, pipeline: Any, modules: Mapping[str, str]) -> None:
        self._pipeline = pipeline
        self._own: Adapters = ()
        self.loaded: dict[str, str] = {}  # name -> where it came from; the one that was asked for least recently first
        self._held: set[str] = set()  # what the pipeline has
        self._active: Adapters | None = ()
        for name, where in modules.items():
            self.load(name, where)

    def load(self, name: str, where: str) -> None:
        """Load one more; it is off. ModelLoadError if it cannot be, and then nothing is left of it."""
        if not self._held:
            self._own = _active(self._pipeline)
        if name in dict(self._own):
            raise ModelLoadError(f"lora_modules {name!r}: the pipeline has an adapter of that name; give another one")
        self._active = None
        self._held.add(name)
        try:
            _load(self._pipeline, name, where)
            take_turns(self._pipeline, denoisers_of(self._pipeline).values())  # diffusers has made the hooks anew
            self.loaded[name] = where
        finally:
            if name not in self.loaded:
                self.remove(name)
        self.use(())

    def remove(self, name: str) -> None:
        """Take an adapter off the pipeline, which no request may use."""
        self.loaded.pop(name, None)
        self._held.remove(name)
        self._active = None
        if not isinstance(self._pipeline, LoraBaseMixin):
            return
        if set().union(*self._pipeline.get_list_adapters().values()) - {name}:
            self._pipeline.delete_adapters(name)
        else:
            self._pipeline.unload_lora_weights()
        self.use(())

    def check(self, adapters: Adapters) -> None:
        """InvalidValueError for a name that is not loaded."""
        for name, _ in adapters:
            if name not in self.loaded:
                known = f"must be one of: {', '.join(self.loaded)}" if self.loaded else "is not there: none is loaded"
                raise InvalidValueError("lora_request", name, f"{known}; load it first")
            self.loaded[name] = self.loaded.pop(name)

    def use(self, adapters: Adapters) -> None:
        """Turn exactly these adapters on, beside the caller's own; they stay on until another set is asked for."""
        if adapters == self._active:
            return
        before, self._active = self._active, None  # unless all goes well
        if on := self._own + tuple(adapters):
            if not before:
                self._pipeline.enable_lora()
            self._pipeline.set_adapters([name for name, _ in on], [scale for _, scale in on])
        elif self._held:
            self._pipeline.disable_lora()
        self._active = adapters

    def close(self) -> None:
        """Take every adapter of ours off the pipeline again."""
        for name in sorted(self._held):
            self.remove(name)


def _active(pipeline: Any) -> Adapters:
    """The adapters that are on, with their scales; InvalidValueError for one whose scale differs between layers."""
    parts = pipeline.components.values() if isinstance(pipeline, LoraBaseMixin) else ()
    found = {pair for part in parts if isinstance(part, torch.nn.Module) for pair in asked_scales(part)}
    own = tuple(sorted(found))
    for (name, _), (other, _) in pairwise(own):
        if name == other:
            fix = "has another scale in some layers: fuse it (pipeline.fuse_lora()), or name its file in lora_modules"
            raise InvalidValueError("lora_modules", name, fix)
    return own


def _load(pipeline: Any, name: str, where: str) -> None:
    path = Path(os.path.expanduser(where))  # Path's own raises for an unknown user, and exists for a name too long
    local = os.path.exists(path)
    if fault := no_adapter(where):
        raise ModelLoadError(f"lora_modules {name!r}: {where!r} {fault}")
    if not isinstance(pipeline, LoraBaseMixin):
        raise ModelLoadError(f"lora_modules {name!r}: {type(pipeline).__name__} takes no LoRA adapters")
    try:
        pipeline.load_lora_weights(str(path) if local else where, adapter_name=name, use_safetensors=True)
    except UNREADABLE as error:
        raise ModelLoadError(f"lora_modules {name!r}: could not be loaded: {error}") from error
    if not any(name in names for names in pipeline.get_list_adapters().values()):
        raise ModelLoadError(f"lora_modules {name!r}: {path.name} holds no adapter for {type(pipeline).__name__}")
