"""Who advances: policy only. Knows request ids, keys and ticks; imports no torch.

Requests whose next step needs no blocks go first, whatever their number: it costs next to nothing, and it lets the
others' compute steps meet in full batches. Then text encoders and decoders: who begins joins the next forward, who ends
leaves, and the calls of those that came or end together meet. Then the compute group whose oldest member waits longest.
Where each of these parts must make room for the other on the device, encoders and decoders wait until half of the
requests are there, or the first for `PATIENCE` forwards, and a compute group goes on until another has waited as long.
A request can skip only a bounded number of steps before it computes, and has few calls of encoders and decoder, so no
group starves.

Who begins: the waiting request of lowest `virtual_arrival`. A level of priority is worth `AGEING_S` seconds of waiting,
so a request is overtaken by those alone that come within its disadvantage, and none starves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from enum import IntEnum
from itertools import count
from typing import NamedTuple

AGEING_S = 5.0
PATIENCE = 8


class StepKind(IntEnum):
    """What a parked call needs, in the order in which they go."""

    SKIP = 0  # a forward without blocks
    COMPONENT = 1  # a text encoder, or the VAE's decoder
    COMPUTE = 2  # a forward with all its blocks


class Place(NamedTuple):
    """A waiting request: calls with equal `key` and of one `kind` may be made as one."""

    key: Hashable
    kind: StepKind
    since: int  # the tick at which it parked


def virtual_arrival(arrived: float, priority: int) -> float:
    """When a request would have come, had all the same priority; both grow alike with time, so the order is static."""
    return arrived + priority * AGEING_S


class StepScheduler:
    """Admits up to `max_num_seqs` requests by priority and age, and picks one batch of parked calls at a time."""

    def __init__(self, max_num_seqs: int, components_last: bool = False) -> None:
        self.max_num_seqs = max_num_seqs
        self.components_last = components_last
        self.held = False  # nobody begins
        self._last: Hashable = None  # the key of the last batch
        self.running: dict[str, Place | None] = {}
        self.idle: set[str] = set()  # of `running`: they go on only while nobody else is there
        self._queue: list[tuple[float, int, str]] = []  # virtual arrival, order, request; sorted
        self._order = count()
        self._tick = 0

    def __len__(self) -> int:
        """Requests that wait or run; those that fill idle time do not count."""
        return len(self._queue) + len(self.running) - len(self.idle)

    @property
    def waiting(self) -> list[str]:
        """Those that have not begun, the next one first."""
        return [request_id for _, _, request_id in self._queue]

    def add(self, request_id: str, priority: int = 0, arrived: float = 0.0) -> None:
        """Let a request wait; lower `priority` runs earlier, `arrived` is in seconds of any one clock."""
        insort(self._queue, (virtual_arrival(arrived, priority), next(self._order), request_id))

    def fill(self, request_id: str) -> None:
        """Begin a request that fills idle time."""
        self.idle.add(request_id)
        self.running[request_id] = None

    def remove(self, request_id: str) -> None:
        """Forget a request, wherever it is."""
        if request_id in self.running:
            del self.running[request_id]
            self.idle.discard(request_id)
        else:
            self._queue = [entry for entry in self._queue if entry[2] != request_id]

    def admit(self) -> list[str]:
        """The requests that begin now."""
        admitted = []
        while not self.held and self._queue and len(self.running) - len(self.idle) < self.max_num_seqs:
            _, _, request_id = self._queue.pop(0)
            self.running[request_id] = None
            admitted.append(request_id)
        return admitted

    def park(self, request_id: str, key: Hashable, kind: StepKind) -> None:
        """A running request waits for its next call."""
        self.running[request_id] = Place(key, kind, self._tick)

    def leave(self, request_id: str) -> None:
        """A running request's call is made elsewhere: it waits for no turn until it parks again."""
        self.running[request_id] = None

    def schedule(self, one_by_one: bool = False) -> list[str]:
        """The next batch: ids of parked requests of one key and kind; empty if nobody is parked.

        `one_by_one`: the first that began goes on to its end.
        """
        self._tick += 1
        parked = [(i, p) for i, p in self.running.items() if p is not None and (i not in self.idle or not len(self))]
        if one_by_one:
            first = next((i for i in self.running if i not in self.idle or not len(self)), None)
            parked = [(i, p) for i, p in parked if i == first]
        if not parked:
            return []
        if self.components_last:
            parked = self._but_components(parked)
        _, oldest = min(parked, key=lambda item: (item[1].kind, item[1].since))
        if self.components_last and self._tick - oldest.since < PATIENCE:  # another key may be another denoiser's
            oldest = next((p for _, p in parked if (p.key, p.kind) == (self._last, oldest.kind)), oldest)
        self._last = oldest.key
        return [i for i, p in parked if p.key == oldest.key and p.kind == oldest.kind]

    def _but_components(self, parked: list[tuple[str, Place]]) -> list[tuple[str, Place]]:
        """Those that need no encoder or decoder, as long as the others can wait."""
        others = [(i, p) for i, p in parked if p.kind is not StepKind.COMPONENT]
        first = min((p.since for _, p in parked if p.kind is StepKind.COMPONENT), default=self._tick)
        waits = 2 * len(others) > len(parked) and self._tick - first < PATIENCE
        return others if waits else parked

    def postpone(self, request_ids: list[str]) -> None:
        """Let scheduled requests that found no room wait on, behind the other groups: those before them end first."""
        self.running |= {i: p._replace(since=self._tick) for i in request_ids if (p := self.running[i]) is not None}
