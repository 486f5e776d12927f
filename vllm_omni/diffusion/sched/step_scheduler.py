"""Who advances: policy only. Knows request ids, keys and ticks; imports no torch.

Requests whose next step needs no blocks go first, whatever their number: it costs next to nothing, and it lets the
others' compute steps meet in full batches. Then the compute group whose oldest member waits longest. A request can skip
only a bounded number of steps before it computes, so no group starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from vllm_omni.diffusion.sched.interface import Parked


class StepScheduler:
    """First come, first served admission of up to `max_num_seqs` requests; one batch of parked calls at a time."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[str] = deque()
        self.running: dict[str, Parked | None] = {}
        self._tick = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request_id: str) -> None:
        self.waiting.append(request_id)

    def remove(self, request_id: str) -> None:
        """Forget a request, wherever it is."""
        if self.running.pop(request_id, None) is None and request_id in self.waiting:
            self.waiting.remove(request_id)

    def admit(self) -> list[str]:
        """The requests that begin now."""
        admitted = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            request_id = self.waiting.popleft()
            self.running[request_id] = None
            admitted.append(request_id)
        return admitted

    def park(self, request_id: str, key: Hashable, skips: bool) -> None:
        """A running request has reached its denoiser again."""
        self.running[request_id] = Parked(key, skips, self._tick)

    def schedule(self) -> list[str]:
        """The next batch: ids of parked requests with one key and one kind of step; empty where nobody is parked."""
        self._tick += 1
        parked = [(request_id, p) for request_id, p in self.running.items() if p is not None]
        if not parked:
            return []
        _, oldest = min(parked, key=lambda item: (not item[1].skips, item[1].since))
        return [i for i, p in parked if p.key == oldest.key and p.skips == oldest.skips]
