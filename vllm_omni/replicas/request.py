"""A request of a pool on its way over one or more replicas. Knows no engine and no rule."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.diffusion.scheduler import virtual_arrival
from vllm_omni.errors import InvalidValueError, OmniError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas.replica import Replica
from vllm_omni.replicas.routing import MOST_AGAIN


@dataclass(eq=False)
class PoolRequest:
    """What was asked, so that it can be asked again and become the same picture."""

    request_id: str
    prompt: Any
    params: OmniDiffusionSamplingParams
    priority: int
    timeout_s: float | None
    salt: str
    arrived: float = field(default_factory=time.monotonic)
    accepted: bool = False  # an engine was there to take it: it is not refused any more
    place: asyncio.Future[Replica | None] | None = None  # where it goes; None: nowhere, ever
    taken: int = 0  # replicas that have taken it, one after another
    told: bool = False  # a picture has gone out, if only a preview: another engine cannot continue that
    step: int = 0  # the last that was reported
    refused_by: set[str] = field(default_factory=set)  # replicas that turned out to lack what it needs

    def __post_init__(self) -> None:
        """A seed is drawn here: an engine that drew its own would draw another one next time."""
        if self.timeout_s is not None and not 0 < self.timeout_s < float("inf"):
            raise InvalidValueError("timeout_s", self.timeout_s, "must be a number of seconds above 0")
        if not isinstance(self.priority, int) or self.priority.bit_length() > 31:
            raise InvalidValueError("priority", self.priority, "must be a whole number of at most 32 bits")
        if self.params.seed is None and self.params.generator is None:
            self.params = self.params.model_copy(update={"seed": secrets.randbits(32)})

    @property
    def may_be_asked_again(self) -> bool:
        return not self.told and self.taken <= MOST_AGAIN

    @property
    def turn(self) -> float:
        """When it would have come, had all the same priority."""
        return virtual_arrival(self.arrived, self.priority)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.arrived

    @property
    def left_s(self) -> float | None:
        """Of its time-out."""
        return None if self.timeout_s is None else max(1e-6, self.timeout_s - self.waited_s)

    @property
    def settled(self) -> bool:
        """Whether it waits for a place no more."""
        return self.place is None or self.place.done()

    def give_up(self) -> None:
        """Nobody waits for its place any more; one that was kept in this very moment is free again."""
        place = self.place
        kept = None
        if place is not None and place.done() and not place.cancelled() and place.exception() is None:
            kept = place.result()
        if kept is not None:
            kept.coming.pop(self, None)

    def settle(self, answer: Replica | OmniError | None) -> None:
        """End its waiting: it goes there, fails, or goes nowhere any more."""
        if self.place is None or self.settled:
            return
        if isinstance(answer, OmniError):
            self.place.set_exception(answer)
        else:
            self.place.set_result(answer)

    @property
    def adapters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.params.lora_request or ())

    def is_news(self, output: OmniRequestOutput) -> bool:
        """Whether its owner should see a report: one that is asked again repeats steps that it has reported."""
        if output.finished or output.images:
            return True
        if output.step < self.step:
            return False
        self.step = output.step
        return True
