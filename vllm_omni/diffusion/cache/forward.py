"""Applying decisions to one forward that several requests share: the only place where residuals meet a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_omni.diffusion.cache.gate import Gate, GateCache, Look
from vllm_omni.diffusion.cache.request_cache import CachePlan, Forecast, Key
from vllm_omni.diffusion.hooks.block_stack import BlockStack
from vllm_omni.kernels import ops


class Record(Protocol):
    """What a request's cache is to a forward: `RequestCache`, or the calibration that keeps everything."""

    @property
    def settings(self) -> dict[str, object]: ...
    @property
    def plan(self) -> CachePlan | None: ...
    @property
    def computed_steps(self) -> int: ...
    @property
    def skipped_steps(self) -> int: ...

    def forecast(self, key: Key, step: int, rows: int) -> Forecast | None: ...
    def wants(self, key: Key, step: int) -> bool: ...
    def put(self, key: Key, step: int, after: torch.Tensor, before: torch.Tensor) -> None: ...
    def did(self, key: Key, step: int, computed: bool) -> None: ...
    def drop(self) -> None: ...


@dataclass(frozen=True)
class Member:
    """One request's rows in a forward, and where it stands."""

    cache: Record
    key: Key
    step: int
    rows: slice

    @property
    def wants(self) -> bool:
        return self.cache.wants(self.key, self.step)


def correction(forecasts: Sequence[tuple[slice, Forecast]], hidden_states: torch.Tensor) -> torch.Tensor:
    """x + sum_j w_j r_j, row by row; x of shape (rows, tokens, channels) is not changed."""
    terms = [(residual, weight, rows.start) for rows, forecast in forecasts for residual, weight in forecast]
    residuals, weights, first_rows = (list(column) for column in zip(*terms, strict=True)) if terms else ([], [], [])
    return ops.forecast(hidden_states, residuals, weights, first_rows)


def probe(gate: Gate, stack: BlockStack, run: Callable[[], Any]) -> torch.Tensor:
    """What a gate wants to see inside a forward; `run` makes one. Shape (rows, tokens, channels)."""
    return stack.probe(run, attention=gate.look is Look.MODULATED)


def note_computed(
    stack: BlockStack | None, members: Sequence[Member], latents: torch.Tensor | None = None, output: Any = None
) -> None:
    """After a computed forward: every member that will need its residual gets it, its own rows alone."""
    for member in members:
        if isinstance(member.cache, GateCache) and latents is not None:
            first = stack.first_residual(member.rows) if stack is not None else None
            own = _first_tensor(output)[member.rows]
            member.cache.learn(member.key, member.step, latents[member.rows], own, first)
        if stack is not None and member.wants and (ends := stack.ends(member.rows)) is not None:
            member.cache.put(member.key, member.step, *ends)
        member.cache.did(member.key, member.step, computed=True)


def _first_tensor(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return _first_tensor(next(iter(output.values())) if isinstance(output, dict) else output[0])


def note_skipped(members: Sequence[Member]) -> None:
    for member in members:
        member.cache.did(member.key, member.step, computed=False)
