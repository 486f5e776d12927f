"""The other ranks of a group, as a rank's runner sees them: what is exchanged, and what happens if a forward fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vllm_omni.errors import DeviceLostError, InvalidValueError
from vllm_omni.kernels.device import without_tensors
from vllm_omni.kernels.promise import mapped, tensors_in

T = TypeVar("T")


class Peers:
    """`size` ranks that make the same forwards in the same order, each its own part."""

    def __init__(
        self, rank: int, size: int, branches: bool, device: torch.device, alike: Callable[[Exception], bool]
    ) -> None:
        """`branches`: a rank's part of a guided step is one of its calls. `alike`: whether all ranks failed so."""
        self.rank, self.size, self.branches, self.device = rank, size, branches, device
        self._alike = alike

    @property
    def share(self) -> tuple[int, int] | None:
        """(index, count) of the calls of a guided step that are made here; None: all are."""
        return (self.rank, self.size) if self.branches else None

    def guarded(self, act: Callable[[], T]) -> T:
        """What `act`, a part of a forward, returns. DeviceLostError if it fails on this rank but not on all.

        What all ranks refuse is the request's own fault, and raised as it is.
        """
        try:
            return act()
        except Exception as error:  # whatever it is, the others wait in a collective, or will
            if not self._alike(error):
                raise DeviceLostError(f"rank {self.rank} failed alone: {type(error).__name__}: {error}") from error
            if isinstance(error, AssertionError):  # of diffusers' sharding
                fix = f"must make a number of tokens that {self.size} ranks can share"
                raise InvalidValueError("size", str(without_tensors(error))[:80], fix) from None
            raise

    def agree(self, values: Sequence[float | None]) -> list[float | None]:
        """Rank 0's values: what was compared by several ranks is decided once."""
        if not values:
            return []
        numbers = [math.nan if value is None else value for value in values]
        told = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(told, src=0)
        return [None if math.isnan(value) else value for value in told.tolist()]

    def completed(self, results: list[list[T]], divided: Sequence[bool]) -> list[list[T]]:
        """The results of each request's calls, where other ranks have made some of those that are `divided`."""
        own = [made[0] for made, some in zip(results, divided, strict=True) if some]
        if not own:
            return results
        others = zip(*self.guarded(lambda: self.swap(own)), strict=True)
        return [list(next(others)) if some else made for made, some in zip(results, divided, strict=True)]

    def swap(self, own: Sequence[Any]) -> list[list[Any]]:
        """By rank, what each has made in the place of `own`: one exchange, of the bytes of its tensors."""
        tensors = [tensor.contiguous() for one in own for tensor in tensors_in(one)]
        sent = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent)
        return [list(own) if rank == self.rank else _like(own, tensors, part) for rank, part in enumerate(parts)]


def _like(own: Sequence[Any], tensors: Sequence[torch.Tensor], part: torch.Tensor) -> list[Any]:
    """`own` with the numbers that another rank has sent."""
    split = part.split([tensor.nbytes for tensor in tensors])
    others = iter(
        [bytes_.clone().view(like.dtype).reshape(like.shape) for bytes_, like in zip(split, tensors, strict=True)]
    )
    return [mapped(lambda _: next(others), one) for one in own]
