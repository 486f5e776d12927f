"""A request of a pool on its way over one or more replicas. Knows no engine."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.diffusion.scheduler import AGEING_S
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput
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
    taken: int = 0  # replicas that have taken it, one after another
    told: bool = False  # a picture has gone out, if only a preview: another engine cannot continue that
    step: int = 0  # the last that was reported
    aborted: bool = False
    refused_by: set[str] = field(default_factory=set)  # replicas that turned out to lack what it needs

    def __post_init__(self) -> None:
        """A seed is drawn here: an engine that drew its own would draw another one next time."""
        if self.params.seed is None and self.params.generator is None:
            self.params = self.params.model_copy(update={"seed": secrets.randbits(32)})

    @property
    def may_be_asked_again(self) -> bool:
        return not (self.told or self.aborted) and self.taken <= MOST_AGAIN

    @property
    def left_s(self) -> float | None:
        """Of its time-out."""
        if self.timeout_s is None or not self.taken:
            return self.timeout_s
        return self.timeout_s - (time.monotonic() - self.arrived)

    @property
    def priority_now(self) -> int:
        """One that is asked again has waited already: it does not go to the end of the queue."""
        return self.priority - int((time.monotonic() - self.arrived) / AGEING_S) if self.taken else self.priority

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
