"""How diffusers' context parallelism has split a module: read from its hooks. Knows no requests.

A model is split on its way in (FLUX), or on the way into its first block (Wan, Qwen-Image). What stands in for that
block has none of its hooks, so it asks here for what they would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

Split = Callable[[torch.Tensor], torch.Tensor]


def splits_of(module: torch.nn.Module) -> dict[str, Split]:
    """What this rank gets of the module's arguments, by name; nothing for those that come whole."""
    return {
        name: partial(hook._prepare_cp_input, cp_input=plan)
        for hook in _split_hooks(module)
        for name, plan in hook.metadata.items()
        if isinstance(name, str) and not isinstance(plan, list | tuple) and not plan.split_output
    }


def mean_of_all(module: torch.nn.Module, mean: Split) -> Split:
    """`mean`, over the parts that all ranks have; as it is if the module is not split. Parts are equally large."""
    hook = next((hook for part in module.modules() for hook in _split_hooks(part)), None)
    if hook is None:
        return mean
    group = hook.parallel_config._flattened_mesh.get_group()

    def of_all(x: torch.Tensor) -> torch.Tensor:
        total = mean(x)
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    return of_all


def _split_hooks(module: torch.nn.Module) -> Iterator[Any]:
    registry = vars(module).get("_diffusers_hook")
    if registry is None:
        return
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    yield from (hook for hook in registry.hooks.values() if isinstance(hook, ContextParallelSplitHook))
