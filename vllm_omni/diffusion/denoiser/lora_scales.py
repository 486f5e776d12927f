"""The LoRA adapters that are on in a module, and how strongly: read, and put back. Switches none."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_ARGUMENTS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")  # with a "scale" for one call


def has_adapters(module: torch.nn.Module) -> bool:
    """Whether adapters were ever loaded into a model of diffusers or transformers."""
    return bool(vars(module).get("_hf_peft_config_loaded", False))


def scale_of_call(arguments: Mapping[str, Any]) -> float | None:
    """The factor on all adapters that a call asks for; the model sets and takes it off within its forward."""
    given = (arguments.get(name) for name in _ARGUMENTS)
    return next((value["scale"] for value in given if isinstance(value, Mapping) and "scale" in value), None)


def scales_of(module: torch.nn.Module) -> Hashable:
    """Equal if the same adapters act equally strongly; None for a module without any."""
    if not has_adapters(module):
        return None
    return tuple(
        (
            layer.disable_adapters,
            tuple(layer.merged_adapters),
            *((n, layer.scaling.get(n)) for n in layer.active_adapters),
        )
        for layer in _layers(module)
    )


def asked_scales(module: torch.nn.Module) -> set[tuple[str, float]]:
    """(adapter, scale) of all that are on, as `set_adapters` takes them: without what rank and alpha make of it."""
    found: set[tuple[str, float]] = set()
    for layer in _layers(module) if has_adapters(module) else ():
        for name in () if layer.disable_adapters else layer.scaling.keys() & set(layer.active_adapters):
            rank, alpha = layer.r[name], layer.lora_alpha[name]
            whole = alpha / (math.sqrt(rank) if layer.use_rslora[name] else rank)
            found.add((name, round(layer.scaling[name] / whole, 6)))
    return found


def scales_kept(modules: Iterable[torch.nn.Module]) -> AbstractContextManager[None]:
    """Put every scale back at the end: a factor of 0, or an error between, otherwise leaves another one behind."""
    adapted = [module for module in modules if has_adapters(module)]
    return _kept(adapted) if adapted else nullcontext()


@contextmanager
def _kept(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    kept = [(layer.scaling, dict(layer.scaling)) for m in modules for layer in _layers(m)]
    try:
        yield
    finally:
        for scaling, own in kept:
            scaling.update(own)


def scales_kept_by(module: torch.nn.Module, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    """The module's adapters are as strong after such a call as before, also if the call scales them and fails."""
    return scales_kept([module]) if scale_of_call(arguments) is not None else nullcontext()


def _layers(module: torch.nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
