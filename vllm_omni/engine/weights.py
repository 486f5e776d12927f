"""The weights of a pipeline that is loaded: moved, dropped, read again, replaced. The parameters stay the same objects.

LoRA adapters are no part of them: they stay where they are, and names are those that the files have without them.
Blocks that are offloaded have their weights in main memory, in tensors that are put back after each forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import load_pipeline
from vllm_omni.errors import InvalidValueError, ModelLoadError, UnknownChoiceError
from vllm_omni.model_folder import check_safetensors

_DTYPES = {"F64", "F32", "F16", "BF16"}  # of safetensors: what a weight can be converted from


def to_host(pipeline: Any) -> Callable[[], None]:
    """Move all weights to main memory; returns what brings them back."""
    every = [t for module in modules_of(pipeline).values() for t in (*module.parameters(), *module.buffers())]
    tensors = list({id(tensor): tensor for tensor in every}.values())  # modules may share some
    devices = [tensor.device for tensor in tensors]
    _move(tensors, [torch.device("cpu")] * len(tensors))
    return lambda: _move(tensors, devices)


def _move(tensors: Sequence[torch.Tensor], devices: Sequence[torch.device]) -> None:
    """Move all of them, or none if there is no room."""
    try:
        moved = [tensor.data.to(device) for tensor, device in zip(tensors, devices, strict=True)]
        for tensor, data in zip(tensors, moved, strict=True):
            tensor.data = data
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def drop(pipeline: Any) -> None:
    """Give back the memory of all weights; buffers, which no file has, stay."""
    _put_back(pipeline)
    for module in modules_of(pipeline).values():
        for parameter in _own_parameters(module).values():
            parameter.data = parameter.data.new_empty(0)
    _keep(pipeline)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reload(config: OmniDiffusionConfig, pipeline: Any, updated: Mapping[str, str]) -> None:
    """Read dropped weights again, of `updated` components from their folders; ModelLoadError leaves all as it is."""
    fresh = load_pipeline(config)
    for name, folder in updated.items():
        update(fresh, Path(folder), [name])
    for name, module in modules_of(pipeline).items():
        source = _own_parameters(getattr(fresh, name))
        for key, parameter in _own_parameters(module).items():
            parameter.data = source[key].data
    _keep(pipeline)


def update(pipeline: Any, folder: Path, names: Sequence[str] | None) -> list[str]:
    """Replace weights by those of a model's folder: of the components `names`, or of all that the folder has.

    A folder with weights and no components is taken for the denoiser's own. Names, shapes and types are checked, and
    all is read, before anything changes. Returns the components that have new weights.
    """
    _put_back(pipeline)
    modules = modules_of(pipeline)
    for name in names or ():
        if name not in modules:
            raise UnknownChoiceError("target_modules", name, modules)
    found = {name: files for name in names or modules if (files := sorted((folder / name).glob("*.safetensors")))}
    if not found and (files := sorted(folder.glob("*.safetensors"))):
        found = {(names or ["transformer"])[0]: files}
    if not found or (names and len(found) < len(names)):
        wanted = ", ".join(names or modules)
        raise InvalidValueError("model_path", folder.name, f"must hold .safetensors of {wanted}, each in its folder")
    staged: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, files in found.items():
        staged += _staged(name, modules[name], files)
    with torch.no_grad(), torch.inference_mode(False):
        for held, new in staged:
            held.data.copy_(new)
    return list(found)


def modules_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _groups(pipeline: Any) -> list[Any]:
    """What diffusers' group offloading moves as one."""
    parts = [part for module in modules_of(pipeline).values() for part in module.modules()]
    registries = [own for part in parts if (own := vars(part).get("_diffusers_hook")) is not None]
    return [hook.group for own in registries if (hook := own.get_hook("group_offloading")) is not None]


def _put_back(pipeline: Any) -> None:
    """Offload blocks that were brought for a forward which had no need of them."""
    for group in _groups(pipeline):
        group.offload_()


def _keep(pipeline: Any) -> None:
    """Have the weights as they are now brought for the next forward."""
    for group in _groups(pipeline):
        group.cpu_param_dict.update({tensor: tensor.data for tensor in group.cpu_param_dict})


def _own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    named = module.named_parameters()
    return {name.replace(".base_layer.", "."): parameter for name, parameter in named if ".lora_" not in name}


def _staged(name: str, module: torch.nn.Module, files: Sequence[Path]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tensor of the module, what the files have for it) for all of them; nothing has changed yet."""
    state = module.state_dict(keep_vars=True)
    held = {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}
    missing = {id(parameter): key for key, parameter in _own_parameters(module).items()}
    read: dict[str, torch.Tensor] = {}
    for file in files:
        check_safetensors(file)
        try:
            with safe_open(file, framework="pt") as opened:
                keys = opened.keys()
                for key in keys:
                    _check(f"{name}.{key}", opened.get_slice(key), held.get(key), key in read)
                    missing.pop(id(held[key]), None)
                read |= {key: opened.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{file.name} cannot be read: {error}") from error
    if missing:
        raise InvalidValueError(
            "model_path", next(iter(missing.values())), f"must hold all weights of {name}; one lacks"
        )
    return [(held[key], tensor) for key, tensor in read.items()]


def _check(name: str, given: Any, held: torch.Tensor | None, twice: bool) -> None:
    if held is None or twice:
        raise InvalidValueError(
            "model_path", name, "holds a weight twice" if twice else "holds a weight of another model"
        )
    shape, dtype = tuple(given.get_shape()), given.get_dtype()
    if shape != tuple(held.shape):
        raise InvalidValueError("model_path", name, f"holds a weight of another shape, {shape} for {tuple(held.shape)}")
    if held.is_floating_point() and dtype not in _DTYPES:
        raise InvalidValueError("model_path", name, f"holds a weight of type {dtype}; use one of {sorted(_DTYPES)}")
