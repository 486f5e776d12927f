"""From a loaded engine to one rank of a group: the process groups, the split model, and what all ranks must share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoiser.specs import denoisers_of, unwrapped
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.distributed.config import ParallelConfig
from vllm_omni.distributed.pace import GroupPace
from vllm_omni.distributed.peers import Peers
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.placement import finish_move

# A device's exchange counts from when it is asked for, which may be turns before it begins: the time-out of a step.
DEVICE_TIMEOUT_S = 600.0
RING_KERNEL = "_native_flash"  # torch's own, of those that return the sums of their exponentials
WITHOUT_SUMS = {"native", "_native_npu"}  # of those that diffusers splits


def config_of(config: OmniDiffusionConfig, rank: int) -> OmniDiffusionConfig:
    """The engine arguments of one rank: its device, and no learning, whose trials follow the clock."""
    changes: dict[str, Any] = {}
    if torch.cuda.is_available() and config.device in (None, "cuda"):
        changes["device"] = f"cuda:{rank}"
    if config.cache_config is not None and config.cache_config.calibrate != "off":
        changes["cache_config"] = config.cache_config.model_copy(update={"calibrate": "off"})
    return config.model_copy(update=changes)


def check_devices(config: OmniDiffusionConfig) -> None:
    """InvalidValueError if the devices are too few, or not of one kind."""
    parallel, kind = config.parallel_config, (config.device or "").partition(":")
    ranks = parallel.ranks
    if kind[2]:
        raise InvalidValueError("device", config.device, "names one device, and every rank has its own; leave it out")
    if dist.is_initialized():
        raise InvalidValueError("parallel_config", f"{ranks} ranks", "needs a process without torch.distributed")
    on_cpu = kind[0] == "cpu" or not torch.cuda.is_available()
    if not on_cpu and torch.cuda.device_count() < ranks:
        fix = f"has more ranks than there are devices, {torch.cuda.device_count()}"
        raise InvalidValueError("parallel_config", f"{ranks} ranks", fix)
    if on_cpu and ranks > parallel.cfg_parallel_size and not torch.accelerator.device_count():
        raise InvalidValueError("parallel_config", f"{ranks} ranks", "needs accelerators: on CPUs no model is split")


def join_group(
    engine: DiffusionEngine, rank: int, rendezvous: str, seed: int, alike: Callable[[Exception], bool]
) -> None:
    """Meet the other ranks, split the model, and let the engine's runner work as one of them."""
    parallel, runner = engine.config.parallel_config, engine.worker.runner
    device = torch.device(engine.config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks are processes of one machine
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # the group sees to it; NCCL would end the process
    backend, timeout_s = "gloo", parallel.rank_timeout_s
    if device.type == "cuda":
        backend, timeout_s = "cpu:gloo,cuda:nccl", max(timeout_s, DEVICE_TIMEOUT_S)
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=parallel.ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    mesh = init_device_mesh(device.type, tuple(parallel.mesh.values()), mesh_dim_names=tuple(parallel.mesh))
    for module in denoisers_of(engine.worker.pipeline).values():
        split(unwrapped(module), parallel, mesh)
        if parallel.tensor_parallel_size > 1:
            finish_move(module, device)
    for group in _groups():  # what each takes of the device is taken before it is asked what is free
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    runner.peers = Peers(rank, parallel, device, alike, mesh.get_group("cfg"))
    for denoiser in runner.denoisers.values():
        denoiser.guarded = runner.peers.guarded
    room = _least(runner.memory.free(engine.config.gpu_memory_utilization), device)
    engine.worker.agree_on_memory(room, runner.peers.largest)
    runner.pace = GroupPace()
    for binder in runner.binders.values():
        binder.pads = parallel.ring_degree == 1  # a ring takes no mask
        binder.multiple = parallel.ulysses_degree if binder.pads and not parallel.unlike else 1
    torch.manual_seed(seed)


def leave_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon_group() -> None:
    """Abort the device's exchanges with ranks that are gone, in any thread; on a CPU they end by themselves."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        c10d._abort_process_group()


def exchanges() -> int:
    """How many collectives this rank has asked for; all ranks have asked for as many at the same place."""
    return sum(group._get_sequence_number_for_group() for group in _groups())


def _groups() -> list[Any]:
    """The process groups that this rank is in, in the order in which all ranks have made theirs."""
    return [*c10d._world.pg_map]


def split(module: torch.nn.Module, parallel: ParallelConfig, mesh: DeviceMesh | None = None) -> None:
    """Split one denoiser by diffusers' own means; InvalidValueError if it cannot be, before anything is changed."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import TensorParallelConfig

    name, config = type(module).__name__, getattr(module, "config", {})
    heads = config.get("num_attention_heads")
    if parallel.tokens_split > 1:
        field = "ulysses_degree" if parallel.ulysses_degree > 1 else "ring_degree"
        if getattr(module, "_cp_plan", None) is None:
            raise InvalidValueError(field, parallel.tokens_split, f"must be 1: diffusers has no way to split {name}")
        if isinstance(heads, int):
            _check_heads(heads, name, parallel)
        if parallel.ring_degree > 1 and next(module.parameters()).is_cuda:
            give_ring_kernel(module, parallel)
        plan: Any = ContextParallelConfig(
            ulysses_degree=parallel.ulysses_degree,
            ring_degree=parallel.ring_degree,
            ulysses_anything=parallel.ulysses_anything,
            ring_anything=parallel.ring_anything,
            mesh=None if mesh is None else mesh["ring", "ulysses"],
        )
    elif parallel.tensor_parallel_size > 1:
        field, size = "tensor_parallel_size", parallel.tensor_parallel_size
        if getattr(module, "_tp_plan", None) is None:
            raise InvalidValueError(field, size, f"must be 1: diffusers has no way to split {name}'s layers")
        if isinstance(heads, int) and heads % size:
            raise InvalidValueError(field, size, f"must divide the {heads} attention heads of {name}")
        plan = TensorParallelConfig(tp_degree=size, mesh=None if mesh is None else mesh["tp"])
    else:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module.enable_parallelism(config=plan)  # type: ignore[operator]
        except (ValueError, NotImplementedError) as error:
            raise InvalidValueError(field, vars(parallel)[field], f"cannot be used with {name}: {error}") from None


def give_ring_kernel(module: Any, parallel: ParallelConfig) -> None:
    """Exchange an attention kernel that does not return its sums, by which a ring joins its parts.

    InvalidValueError if the one that does cannot compute in the module's type.
    """
    if (kernel := _AttentionBackendRegistry.get_active_backend()[0].value) not in WITHOUT_SUMS:
        return
    if module.dtype not in (torch.bfloat16, torch.float16):
        fix = f"must be 1 with the attention kernel {kernel}, which does not return what a ring needs; those that do "
        fix += f"compute in 16 bits, and {type(module).__name__} in {module.dtype}: give --dtype bfloat16"
        raise InvalidValueError("ring_degree", parallel.ring_degree, fix)
    with attention_backend(RING_KERNEL):  # for this module alone
        module.set_attention_backend(RING_KERNEL)


def _check_heads(heads: int, name: str, parallel: ParallelConfig) -> None:
    """InvalidValueError if the ranks cannot share the attention heads; `ulysses_anything` gives the last rank fewer."""
    degree = parallel.ulysses_degree
    most = -(-heads // degree)
    if parallel.ulysses_anything and most * degree - heads >= most:
        fix = f"must leave heads for every rank, of the {heads} attention heads of {name}"
        raise InvalidValueError("ulysses_degree", degree, fix)
    if heads % degree and not parallel.ulysses_anything:
        fix = f"must divide the {heads} attention heads of {name}; with ulysses_anything or as ring_degree it need not"
        raise InvalidValueError("ulysses_degree", degree, fix)


def _least(room: int | None, device: torch.device) -> int | None:
    """The fewest free bytes of any rank."""
    if room is None:
        return None
    told = torch.tensor([room], dtype=torch.int64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return int(told.item())
