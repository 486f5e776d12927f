"""What skipped steps need not embed again: guidance, pooled text and sizes are a request's own and the same in each of
them, and the timesteps of one schedule come again with the next request.

For one forward, the children of an embedding module are exchanged for stand-ins that know earlier outputs by the very
values of the input. A request's own are always right, since its weights, adapters and scales do not change under it.
Those of the request before are used once the first of them has been computed again and was the same to the bit.
Values are read on the CPU alone, where that is free; on a device every child runs as always.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

Known = dict[Hashable, torch.Tensor]
Memory = dict[str, Known]  # a request's own, by child

_LARGEST = 2**14  # bytes of an input worth comparing
_KEPT = 4  # outputs of each child per request: its guidance branches, one step
_KEPT_OF_LAST = 256  # outputs of each child, over requests: steps of a schedule or two


class _Remembering(torch.nn.Module):
    """Stands in for one child of an embedding."""

    def __init__(self, name: str, child: torch.nn.Module) -> None:
        super().__init__()
        self.name = name
        self.child = child
        self._own: Known = {}
        self._last: Known = {}
        self._owner: Known = {}  # whose outputs `_last` are known to agree with

    def use(self, child: torch.nn.Module, memory: Memory) -> None:
        """For one forward; `child` is whatever has its place now."""
        self._modules["child"] = child  # as an assignment does it, less the checks
        self._own = memory.setdefault(self.name, {})

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a compiled model is one graph, which reads no values
            return self.child(x, *args, **kwargs)
        if args or kwargs or x.device.type != "cpu" or x.nbytes > _LARGEST or torch.is_grad_enabled():
            return self.child(x, *args, **kwargs)
        key = (x.dtype, x.shape, x.detach().double().numpy().tobytes())
        output = self._own.get(key)
        if output is None:
            output = self._ask(key, x)
            _keep(self._own, key, output, _KEPT)
        return output

    def _ask(self, key: Hashable, x: torch.Tensor) -> torch.Tensor:
        known = self._last.get(key)
        if known is not None and self._owner is self._own:
            return known
        output = self.child(x)
        if self._owner is not self._own:  # another request: what was true of the last one may not be of this
            if known is None or not torch.equal(known, output):
                self._last.clear()
            self._owner = self._own
        _keep(self._last, key, output, _KEPT_OF_LAST)
        return output


def _keep(known: Known, key: Hashable, output: torch.Tensor, most: int) -> None:
    known[key] = output
    while len(known) > most:
        del known[next(iter(known))]


class Conditioning:
    """The embedding modules of one denoiser, by name; names it lacks are left out."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        self._parts: list[tuple[dict[str, Any], dict[str, _Remembering]]] = []
        for name in names:
            part = module._modules.get(name)
            if part is not None:
                children = {n: _Remembering(f"{name}.{n}", c) for n, c in part._modules.items() if c is not None}
                self._parts.append((part._modules, children))
        self._own: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def enter(self, memory: Memory) -> None:
        """Until `leave`, remember for the request that `memory` belongs to."""
        for modules, children in self._parts:
            own = {name: modules[name] for name in children}
            for name, child in children.items():
                child.use(own[name], memory)
            self._own.append((modules, own))
            modules.update(children)

    def leave(self) -> None:
        for modules, own in self._own:
            modules.update(own)
        self._own.clear()
