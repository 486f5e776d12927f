"""How diffusers' context parallelism has split a module: read from its hooks. Knows no requests.

A model is split on its way in (FLUX), or on the way into its first block (Wan, Qwen-Image). What stands in for that
block has none of its hooks, so it asks here for what they would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Split = Callable[[torch.Tensor], torch.Tensor]


class Unshared(NamedTuple):
    """Tokens that the ranks cannot share: how many, and whether they are the text's."""

    tokens: int
    text: bool


def splits_of(module: torch.nn.Module) -> dict[str, Split]:
    """What this rank gets of the module's arguments, by name; nothing for those that come whole."""
    return {
        name: partial(hook._prepare_cp_input, cp_input=plan)
        for hook in _split_hooks(module)
        for name, plan in hook.metadata.items()
        if isinstance(name, str) and not isinstance(plan, list | tuple) and not plan.split_output
    }


def unshared_in(module: torch.nn.Module, arguments: Mapping[str, Any]) -> Unshared | None:
    """What the ranks cannot share of a call of a split module; None if its arguments do not say."""
    for part in module.modules():
        for hook in _split_hooks(part):
            config = hook.parallel_config
            ranks, any_number = config._flattened_mesh.size(), config.ulysses_anything or config.ring_anything
            for name, plan in hook.metadata.items():
                value = arguments.get(name) if isinstance(name, str) else None
                lists = isinstance(plan, list | tuple)
                if lists or not isinstance(value, torch.Tensor) or value.ndim != plan.expected_dims:
                    continue
                tokens = value.shape[plan.split_dim]
                if tokens < ranks if any_number else tokens % ranks:
                    return Unshared(tokens, name.startswith("encoder"))
    return None


def mean_of_all(module: torch.nn.Module, mean: Split) -> Split:
    """`mean`, over the parts that all ranks have, large or small; as it is if the module is not split."""
    hook = next((hook for part in module.modules() for hook in _split_hooks(part)), None)
    if hook is None:
        return mean
    group = hook.parallel_config._flattened_mesh.get_group()

    def of_all(x: torch.Tensor) -> torch.Tensor:
        numbers = x[0].numel()
        own = mean(x)
        total = torch.cat([own * numbers, own.new_full((1,), numbers)])  # and of how many
        dist.all_reduce(total, group=group)
        return total[:-1] / total[-1]

    return of_all


def _split_hooks(module: torch.nn.Module) -> Iterator[Any]:
    registry = vars(module).get("_diffusers_hook")
    if registry is None:
        return
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    yield from (hook for hook in registry.hooks.values() if isinstance(hook, ContextParallelSplitHook))
