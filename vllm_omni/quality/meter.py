"""Block work, counted as it runs: multiply-adds of the linear layers inside a denoiser's transformer blocks.

Counted at the layers, below whatever hook decides to skip a block or a part of one, so every method is charged alike:
for a first block recomputed on skipped steps, for a feed-forward that runs while attention is cached. Attention's own
products are not counted; they are skipped with their projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.specs import DENOISER_NAMES, DENOISERS

FULL = 0.95  # of a full forward's multiply-adds: prompts of other lengths may differ a little


@dataclass
class Work:
    """`done` multiply-adds, and one (rows, multiply-adds per row) for each forward of a denoiser."""

    done: int = 0
    forwards: list[tuple[int, float]] = field(default_factory=list)

    @property
    def full(self) -> int:
        """Forwards of single rows in which (nearly) all the blocks ran, by the measure of the largest."""
        most = max((each for _, each in self.forwards), default=0.0)
        return sum(rows for rows, each in self.forwards if each >= FULL * most)


@contextmanager
def metered(pipeline: Any) -> Iterator[Work]:
    """Within, every forward of the pipeline's denoisers is counted."""
    work = Work()
    handles = []
    for name in DENOISER_NAMES:
        denoiser = vars(pipeline).get(name)
        if not isinstance(denoiser, torch.nn.Module):
            continue
        for layer in _linear_layers(denoiser):
            handles.append(layer.register_forward_hook(_layer_ran(work)))
        begin, end = _forward_ran(work)
        handles.append(denoiser.register_forward_pre_hook(begin))
        handles.append(denoiser.register_forward_hook(end, with_kwargs=True))
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def _linear_layers(denoiser: torch.nn.Module) -> list[torch.nn.Linear]:
    spec = DENOISERS.get(type(denoiser).__name__)
    lists = [n for n, child in denoiser.named_children() if isinstance(child, torch.nn.ModuleList)]
    names = lists if spec is None else [block_list.name for block_list in spec.stack]
    inside = [module for name in names for module in denoiser.get_submodule(name).modules()]
    return [module for module in dict.fromkeys(inside) if isinstance(module, torch.nn.Linear)]


def _layer_ran(work: Work) -> Any:
    def note(layer: torch.nn.Linear, _: Any, output: torch.Tensor) -> None:
        work.done += output.numel() * layer.in_features

    return note


def _forward_ran(work: Work) -> tuple[Any, Any]:
    before = [0]

    def begin(*_: Any) -> None:
        before[0] = work.done

    def end(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        rows = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[0]
        work.forwards.append((rows, (work.done - before[0]) / rows))

    return begin, end
