"""The calls that a pipeline makes of its denoiser in one step, and which of them may wait for the next one.

Guidance is two calls with two prompts, whose results the pipeline joins. A step that was seen as a whole says how many
calls a step has, and what they return. Knows no engine; one of these belongs to each request.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_omni.kernels.device import is_out_of_memory
from vllm_omni.kernels.promise import form_of
from vllm_omni.logger import init_logger
from vllm_omni.nested import tensors_in

logger = init_logger(__name__)
TRIES = 2  # steps with several calls that are looked at before a request is let be

Place = tuple[int, int]  # run and step


@dataclass
class Branch:
    """One call of a step. `key` is None if it must be made alone."""

    name: Hashable  # denoiser and guidance branch
    shapes: tuple[Any, ...]
    key: Hashable
    form: Any = None  # of its result
    arguments: Mapping[str, Any] = field(default_factory=dict)  # while the step is looked at, and copies of its tensors
    copies: list[torch.Tensor] = field(default_factory=list)


class StepCalls:
    """The calls of a request's steps, as they come."""

    def __init__(self) -> None:
        self.over = False  # no call is answered any more before it is made
        self.looked_at: Place | None = None  # the step in which a result was asked for before its time
        self._orders: dict[Hashable, list[Branch]] = {}  # of steps whose calls may be made as one, by the first's name
        self._place: Place | None = None
        self._now: list[Branch] = []
        self._tries = 0
        self._several = True  # the last step had several calls, or none was seen yet

    @property
    def known(self) -> int:
        """How many calls of this step can be made as one; 0 as long as that is not known."""
        return 0 if self.over else len(self._order)

    @property
    def _order(self) -> list[Branch]:
        return self._orders.get(self._now[0].name, []) if self._now else []

    def comes(self, place: Place, name: Hashable, key: Hashable, arguments: Mapping[str, Any]) -> Any:
        """Note a call; returns the form of its result if it can be answered before it is made, None if not.

        `key` says which calls fit together, None that this one fits no other.
        """
        if place != self._place:
            self._learn()
            self._place, self._now = place, []
        watched = not self.over and (self._several or self._now or name in self._orders)
        branch = Branch(name, tuple(tensor.shape for tensor in tensors_in(arguments)) if watched else (), key)
        self._now.append(branch)
        if self.over or key is None:
            return None
        if not self._order and self._several:
            branch.arguments = arguments
            try:
                branch.copies = [tensor.clone() for tensor in tensors_in(arguments)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.over = True  # nor is there room for two calls at once
                return None
            if any(map(_changed, self._now[:-1])):  # one buffer for both: the first call would get the second's
                self.over = True
            return None
        order, index = self._order, len(self._now) - 1
        if index >= len(order) - 1 or (order[index].name, order[index].shapes) != (branch.name, branch.shapes):
            return None
        return order[index].form

    def returned(self, name: Hashable, result: Any) -> None:
        """Note what the call of that name has returned."""
        for branch in self._now if self._several and not (self._order or self.over) else ():
            if branch.name == name:
                try:
                    branch.form = form_of(result)
                except TypeError:  # something that cannot be promised
                    self.over = True

    def asked(self) -> None:
        """Note that a result is needed before the step's next call, if there will be one."""
        self.over, self.looked_at = True, self._place

    def _learn(self) -> None:
        """Take in a step that is over."""
        calls, self._several = self._now, len(self._now) != 1
        if self._order or self.over or len(calls) < 2:
            return
        if any(call.key is not None and not call.arguments for call in calls):
            return  # not looked at: the step before had one call
        if len({call.key for call in calls}) == 1 and all(call.form is not None for call in calls):
            self._orders[calls[0].name] = [Branch(call.name, call.shapes, call.key, call.form) for call in calls]
            return
        self._tries += 1
        self.over = self._tries >= TRIES


class Readers:
    """The arguments with which a pipeline reads the result of a step's first call before it makes the second."""

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._known: set[frozenset[str]] = set()

    def __contains__(self, given: frozenset[str]) -> bool:
        return given in self._known

    def add(self, given: frozenset[str]) -> None:
        """Remember it, and say so once."""
        if not self._known:
            why = "it reads the result of the first before the second"
            logger.info("the guidance of %s is made call by call: %s", self._pipeline, why)
        self._known.add(given)


def _changed(branch: Branch) -> bool:
    """Whether a call's arguments are others by now."""
    now = list(tensors_in(branch.arguments))
    if len(now) != len(branch.copies):
        return True
    return not all(torch.equal(one, other) for one, other in zip(now, branch.copies, strict=True))
