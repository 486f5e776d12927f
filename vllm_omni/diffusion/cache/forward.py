"""Applying the cache to one forward that several requests share: the only place where residuals meet a batch.

The engine and a plain pipeline both come here. Whether a call skips is known before its forward (`look` asks the gates
that need to see it); a `CachedForward` then opens the block stack, and after success `commit` brings every request's
state what it is to keep. Tensors are made first and states changed last, so a failure changes no request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeGuard

import torch

from vllm_omni.diffusion.cache.state import CacheState, Computed, Forecast, Kept, Key, Output, Signal
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.rows import latents_of, take_rows
from vllm_omni.kernels import ops, promise
from vllm_omni.nested import tensors_in


class BatchRows(NamedTuple):
    """One request's rows in a forward, where it stands, and the arguments of its own call."""

    state: CacheState
    key: Key
    step: int
    rows: slice
    arguments: Mapping[str, Any]

    def made_elsewhere(self, result: Any, skipped: bool) -> None:
        """Count the step of a call that another rank has made: `result`. Its residuals are kept there."""
        computed = Computed(None, slice(None), latents_of(self.arguments), result, elsewhere=True)
        kept = None if skipped else self.state.prepare(self.key, self.step, computed)
        self.state.forget(self.key)
        self.state.commit(self.key, self.step, kept)


def look(
    batch: Sequence[BatchRows],
    signal: Signal,
    stack: BlockStack | None,
    run: Callable[[], Any] | None,
    agree: Callable[[list[float | None]], list[float | None]] = list,
) -> None:
    """Show each request's gate its rows, and take the decisions: one device read for all, none if none hangs on data.

    `run` is a forward of the denoiser with the batch's arguments; a gate that compares latents needs neither. `agree`
    returns the changes by which all ranks decide.
    """
    if signal is Signal.LATENTS:
        shown = [row.state.describe(row.arguments, row.step) for row in batch]
    else:
        assert stack is not None and run is not None
        seen = stack.probe(run, attention=signal is Signal.MODULATED, rows=batch[-1].rows.stop)
        shown = [seen[row.rows].clone() if len(batch) > 1 else seen for row in batch]
    changes = [row.state.change(row.key, row.step, now) for row, now in zip(batch, shown, strict=True)]
    known = [change for change in changes if change is not None]
    values = iter(torch.stack(known).tolist() if known else ())
    decisive = agree([None if change is None else next(values) for change in changes])
    for row, now, change in zip(batch, shown, decisive, strict=True):
        row.state.decide(row.key, row.step, now, change)


def is_of_output(forecast: Forecast | None) -> TypeGuard[Forecast]:
    """Whether a forecast stands in for the whole denoiser, rather than for its blocks."""
    return forecast is not None and any(isinstance(kept, Output) for kept, _ in forecast)


def blended(forecast: Forecast) -> Any:
    """sum_j w_j o_j in fp32, rounded once: outputs of earlier steps, of whatever form, in the place of a forward's."""
    outputs = [[*tensors_in(output.value)] for output, _ in forecast if isinstance(output, Output)]
    sums = []
    for tensors in zip(*outputs, strict=True):
        total = torch.zeros_like(tensors[0], dtype=torch.float32)
        for tensor, (_, weight) in zip(tensors, forecast, strict=True):
            total.add_(tensor, alpha=weight)
        sums.append(total.to(tensors[0].dtype))
    first, each = forecast[0][0], iter(sums)
    assert isinstance(first, Output)
    return promise.mapped(lambda _: next(each), first.value)


def corrected(forecasts: Sequence[tuple[slice, Forecast]], hidden_states: torch.Tensor) -> torch.Tensor:
    """x + sum_j w_j r_j, row by row; x of shape (rows, tokens, channels) is not changed."""
    every = [(residual, weight, rows.start) for rows, forecast in forecasts for residual, weight in forecast]
    terms = [term for term in every if not isinstance(term[0], Output)]
    residuals, weights, first_rows = (list(column) for column in zip(*terms, strict=True)) if terms else ([], [], [])
    return ops.forecast(hidden_states, residuals, weights, first_rows)


class CachedForward:
    """A scope around one forward of a denoiser: skipped if every request has a forecast, else computed.

    `stack` is None if nothing may be taken from this forward, or put into it.
    """

    def __init__(
        self, stack: BlockStack | None, batch: Sequence[BatchRows], forecasts: Sequence[Forecast | None]
    ) -> None:
        self._batch = batch
        self._forecasts = [(row.rows, f) for row, f in zip(batch, forecasts, strict=True) if f is not None]
        self.skips = bool(batch) and len(self._forecasts) == len(batch)
        self._cached = stack is not None
        self._stack = stack if self.skips or any(row.state.wants(row.key, row.step) for row in batch) else None

    def open(self) -> Self:
        """Exchange the block stack, if need be."""
        if self._stack is not None:
            rows = self._batch[-1].rows.stop
            self._stack.enter(partial(corrected, self._forecasts) if self.skips else None, rows)
        return self

    __enter__ = open

    def results(self, result: Any) -> list[Any]:
        """What each request gets if the forward has returned `result`: its rows, or its output as forecast.

        If all are forecast there need be no forward; `result` is None then.
        """
        alone = len(self._batch) == 1
        forecasts = [forecast for _, forecast in self._forecasts] if self.skips else [None] * len(self._batch)
        return [
            blended(forecast) if is_of_output(forecast) else result if alone else take_rows(result, row.rows)
            for row, forecast in zip(self._batch, forecasts, strict=True)
        ]

    def commit(self, result: Any) -> None:
        """Take in what the forward gave; call it within the scope, after everything else that can fail."""
        kept = [None if self.skips else self._kept_of(row, result) for row in self._batch]
        for row, own in zip(self._batch, kept, strict=True):
            row.state.commit(row.key, row.step, own)

    def _kept_of(self, row: BatchRows, result: Any) -> Kept:
        if not self._cached:
            return Kept()
        computed = Computed(self._stack, row.rows, latents_of(row.arguments), result)
        return row.state.prepare(row.key, row.step, computed)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._stack is not None:
            self._stack.leave()
