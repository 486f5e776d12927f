"""Which device a model goes to, and putting it there. Knows no cache and no request."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_omni.driver import NO_DEVICE, architecture_problem, device_problem, driver_cuda
from vllm_omni.errors import InvalidValueError, ModelLoadError
from vllm_omni.kernels.device import current, is_out_of_memory
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

# What can be on another device than the rest, by the option that says where.
COMPONENTS = {"text_encoder_device": ("text_encoder", "text_encoder_2", "text_encoder_3"), "vae_device": ("vae",)}


def device_for(asked: str | None, option: str = "device") -> str:
    """The device as asked with `option`, or CUDA if there is one.

    InvalidValueError if CUDA is asked for and is not there, or if there is a driver that torch cannot use: a server
    would run on the CPU, and nobody know why.
    """
    available = torch.cuda.is_available()
    wanted = asked is not None and asked.partition(":")[0] == "cuda"
    if asked is not None and not wanted:
        return asked
    if available:
        _check_architecture(option, device := asked or "cuda")
        return device
    driver = driver_cuda()
    problem = device_problem(torch.version.cuda, driver, available)
    if wanted:
        raise InvalidValueError(option, asked, f"cannot be used: {problem or NO_DEVICE}")
    if problem is not None and driver is not None:
        raise InvalidValueError("device", None, f"must be given, e.g. 'cpu', or this mended: {problem}")
    if problem is not None:
        logger.warning("%s", problem)
    return "cpu"


def _check_architecture(option: str, device: str) -> None:
    """InvalidValueError if torch has no kernels for the device: each request would fail at its first one."""
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        return  # torch says that there is none
    built = torch.cuda.get_arch_list()
    if (problem := architecture_problem(index, torch.cuda.get_device_capability(index), built)) is not None:
        raise InvalidValueError(option, device, f"cannot be used: {problem}")


def device_in_turn(asked: str | None, turn: int) -> str | None:
    """The device of one of several engines: they take the CUDA devices in turn, unless one of them was asked for."""
    if asked not in (None, "cuda") or not torch.cuda.is_available():
        return asked
    return f"cuda:{turn % torch.cuda.device_count()}"


def see_in_turn(asked: str | None, turn: int, engines: int, ranks: int) -> None:
    """Hide the CUDA devices of all engines but one from this process and those that it starts: the ranks of that one.

    InvalidValueError if there are too few for all. It must come before anything has asked CUDA for its devices.
    """
    count = torch.cuda.device_count() if asked in (None, "cuda") else 0
    if not count:
        return
    if count < engines * ranks:
        fix = f"times {ranks} ranks needs {engines * ranks} devices, and there are {count}"
        raise InvalidValueError("data_parallel_size", engines, fix)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [*map(str, range(count))] if listed is None else listed.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[turn * ranks : (turn + 1) * ranks])


def parts_of(pipeline: Any, option: str) -> dict[str, torch.nn.Module]:
    """The modules that an option of `COMPONENTS` is about, by name; InvalidValueError if there are none."""
    names = COMPONENTS[option]
    found = {name: part for name in names if isinstance(part := vars(pipeline).get(name), torch.nn.Module)}
    if not found:
        raise InvalidValueError(option, "given", f"is for models that have a {names[0]}; leave it out")
    return found


def place(pipeline: Any, devices: Mapping[str, str]) -> dict[str, torch.device]:
    """Move components to `devices`, by option; returns where they were, by name."""
    before: dict[str, torch.device] = {}
    found = {option: parts_of(pipeline, option) for option in devices}
    for option, parts in found.items():
        device = devices[option]
        for name, part in parts.items():
            before[name] = next((tensor.device for tensor in part.parameters()), torch.device("cpu"))
            try:
                part.to(device_for(device, option))
            except (RuntimeError, AssertionError) as error:
                raise InvalidValueError(option, device, f"cannot be used ({str(error).splitlines()[0]})") from error
    return before


def put_on(
    pipeline: Any,
    device: str,
    offload: bool,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    later: Sequence[str] = (),
) -> None:
    """Move the pipeline's parts to the device, or let them come when they are needed; `elsewhere` as for `place`.

    Components named in `later` stay in main memory, for `finish_move`.

    ModelLoadError if they do not fit; InvalidValueError, with torch's own words, if there is no such device.
    """
    try:
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            place(pipeline, elsewhere)
            _move(pipeline, device, [*later, *(name for option in elsewhere for name in COMPONENTS[option])])
    except (RuntimeError, AssertionError) as error:
        if not is_out_of_memory(error):
            raise InvalidValueError("device", device, f"cannot be used ({str(error).splitlines()[0]})") from error
    else:
        return
    _move(pipeline, "cpu")  # what went there would stay as long as somebody holds the pipeline
    parts = {name: _nbytes(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    largest, whole = max(parts, key=lambda name: parts[name]), sum(parts.values())
    free, total = torch.cuda.mem_get_info(torch.device(device))
    raise ModelLoadError(
        f"the weights do not fit on {device}: they take {_shown(whole)} ({largest} {_shown(parts[largest])}), "
        f"and {_shown(free)} of {_shown(total)} are free; set enable_cpu_offload, a shorter dtype, or another device"
    )


def finish_move(module: torch.nn.Module, device: torch.device) -> None:
    """Move what is not on the device yet: all of a module, or what is left of one that was split on the way there.

    ModelLoadError if it does not fit.
    """
    try:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type != device.type:
                tensor.data = tensor.data.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelLoadError(f"this part of the weights does not fit on {device}; set more ranks") from None


def take_turns(pipeline: Any, denoisers: Collection[torch.nn.Module]) -> None:
    """Let each part that diffusers' model offloading brings to the device send the others back.

    By itself it sends back the one before in the order in which a single request calls them. What has no place in
    that order, such as a ControlNet, stays beside a denoiser, as it does there. May be called again: hooks that are
    there already stay as they are.
    """
    hooks = vars(pipeline).get("_all_hooks") or []
    beside = [hook for hook in hooks[1:] if hook.hook.prev_module_hook is None]
    for own in hooks:
        if "pre_forward" in vars(own.hook):
            continue
        leaving = [hook for hook in hooks if hook is not own] if own not in beside else []
        if any(own.model is denoiser for denoiser in denoisers):
            leaving = [hook for hook in leaving if hook not in beside]
        own.hook.pre_forward = partial(_come, leaving, own.hook.pre_forward)


def _come(leaving: Sequence[Any], come: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    for other in leaving:
        first = next(other.model.parameters(), None)
        if first is not None and first.device.type != "cpu":
            other.offload()
    try:
        return come(module, *args, **kwargs)
    except RuntimeError as error:
        if is_out_of_memory(error):  # amid the move, and where the first parameter is decides if there is one
            module.to("cpu")
        raise


def offload_blocks(pipeline: Any, device: str, streamed: Collection[str]) -> None:
    """Keep the weights in main memory, from where blocks come one by one, and other parts when they are called.

    Of the components in `streamed` a block comes while the one before it runs, from locked pages: torch rounds these
    up to as much as twice the bytes. If there is no room for that, pages are locked for the time of each copy.
    """
    from diffusers import ModelMixin
    from diffusers.hooks import apply_group_offloading

    there = torch.device(device)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    streams = [name for name in parts if name in streamed and there.type == "cuda"]
    short = bool(streams) and 2 * sum(_nbytes(parts[name]) for name in streams) > _host_room()
    how: dict[str, Any] = {"onload_device": there, "offload_type": "block_level", "num_blocks_per_group": 1}
    for name, part in parts.items():
        how |= {"use_stream": name in streams, "low_cpu_mem_usage": short}
        with current(there):  # the stream's
            if isinstance(part, ModelMixin):
                part.enable_group_offload(**how)
            else:
                apply_group_offloading(part, **how)


def _host_room() -> int:
    """Bytes of main memory that this process may still take."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    room = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    with suppress(OSError, ValueError):  # no such limit
        most = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        room = min(room, most - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return room


def _move(pipeline: Any, device: str, but: Sequence[str] = ()) -> None:
    """By diffusers, unless a part is a module of somebody's own, which has no `dtype` to be asked for.

    Components named in `but` stay where they are.
    """
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    named = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    parts = [part for name, part in named.items() if name not in but]
    if not but and all(isinstance(part, ModelMixin | PreTrainedModel) for part in parts):
        pipeline.to(device)
    else:
        for part in parts:
            part.to(device)


def _nbytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _shown(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
