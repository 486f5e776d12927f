"""The other ranks of a group, as a rank's runner sees them: what is exchanged, and what happens if a forward fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vllm_omni.distributed.config import ParallelConfig
from vllm_omni.errors import DeviceLostError, InvalidValueError
from vllm_omni.kernels.device import without_tensors
from vllm_omni.kernels.promise import mapped
from vllm_omni.kernels.splits import Unshared, unshared_in
from vllm_omni.nested import tensors_in

T = TypeVar("T")


class Peers:
    """Ranks that make the same forwards in the same order, each its own part."""

    def __init__(
        self,
        rank: int,
        parallel: ParallelConfig,
        device: torch.device,
        alike: Callable[[Exception], bool],
        branches: dist.ProcessGroup | None = None,
    ) -> None:
        """`alike`: whether all ranks failed so. `branches`: those with this part of the other branches; None: all."""
        self.rank, self.device, self._parallel = rank, device, parallel
        self._alike, self._branches = alike, branches
        self._branch = rank * parallel.cfg_parallel_size // parallel.ranks

    @property
    def share(self) -> tuple[int, int] | None:
        """(index, count) of the calls of a guided step that are made here; None: all are."""
        count = self._parallel.cfg_parallel_size
        return (self._branch, count) if count > 1 else None

    def call(self, module: torch.nn.Module, arguments: Mapping[str, Any]) -> Any:
        """What a denoiser returns, `guarded`; tokens that the ranks cannot share are named."""
        try:
            return self.guarded(partial(module, **arguments))
        except AssertionError as error:
            if self._parallel.tokens_split == 1:  # else it is of diffusers' sharding
                raise
            raise self._uneven(str(without_tensors(error)), unshared_in(module, arguments)) from None

    def guarded(self, act: Callable[[], T]) -> T:
        """What `act`, a part of a forward, returns. DeviceLostError if it fails on this rank but not on all.

        What all ranks refuse is the request's own fault, and raised as it is.
        """
        try:
            return act()
        except Exception as error:  # whatever it is, the others wait in a collective, or will
            if not self._alike(error):
                raise DeviceLostError(f"rank {self.rank} failed alone: {type(error).__name__}: {error}") from error
            raise

    def _uneven(self, text: str, unshared: Unshared | None) -> InvalidValueError:
        """What to say of tokens that the ranks cannot share: the text's, or the size's."""
        ranks, lifting = self._parallel.tokens_split, self._parallel.lifting
        fix = f"must make a number of tokens that {ranks} ranks can share"
        if self._parallel.unlike:
            fix = f"must make a token for each of {ranks} ranks at least"
        elif lifting is not None:
            fix += f" ({lifting} lifts that)"
        field = "prompt" if unshared is not None and unshared.text else "size"
        return InvalidValueError(field, text[:80] if unshared is None else unshared.tokens, fix)

    def agree(self, values: Sequence[float | None]) -> list[float | None]:
        """Rank 0's values: what was compared by several ranks is decided once, for all branches."""
        if not values:
            return []
        numbers = [math.nan if value is None else value for value in values]
        told = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(told, src=0)
        return [None if math.isnan(value) else value for value in told.tolist()]

    def largest(self, nbytes: int) -> int:
        """The bytes of the rank that has most of what each keeps now: by them all decide what there is room for."""
        if not self._parallel.unlike:
            return nbytes
        told = torch.tensor([nbytes], dtype=torch.int64)  # the host's: no device is waited for
        self.guarded(lambda: dist.all_reduce(told, op=dist.ReduceOp.MAX))
        return int(told.item())

    def completed(self, results: list[list[T]], divided: Sequence[bool]) -> list[list[T]]:
        """The results of each request's calls, where other ranks have made some of those that are `divided`."""
        own = [made[0] for made, some in zip(results, divided, strict=True) if some]
        if not own:
            return results
        others = zip(*self.guarded(lambda: self.swap(own)), strict=True)
        return [list(next(others)) if some else made for made, some in zip(results, divided, strict=True)]

    def swap(self, own: Sequence[Any]) -> list[list[Any]]:
        """By branch, what was made of it in the place of `own`: one exchange, of the bytes of its tensors."""
        tensors = [tensor.contiguous() for one in own for tensor in tensors_in(one)]
        sent = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
        parts = [torch.empty_like(sent) for _ in range(self._parallel.cfg_parallel_size)]
        dist.all_gather(parts, sent, group=self._branches)
        return [list(own) if i == self._branch else _like(own, tensors, part) for i, part in enumerate(parts)]


def _like(own: Sequence[Any], tensors: Sequence[torch.Tensor], part: torch.Tensor) -> list[Any]:
    """`own` with the numbers that another rank has sent."""
    split = part.split([tensor.nbytes for tensor in tensors])
    others = iter(
        [bytes_.clone().view(like.dtype).reshape(like.shape) for bytes_, like in zip(split, tensors, strict=True)]
    )
    return [mapped(lambda _: next(others), one) for one in own]
