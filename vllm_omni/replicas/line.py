"""Requests that wait for an engine, in the order of their turns, and the choice of one for each.

They wait here and not in the engines: whichever has a place first takes the next one, also an engine that started after
the request had come.
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from vllm_omni.engine.cost import come_back
from vllm_omni.errors import (
    DeadlineExceededError,
    EngineAsleepError,
    EngineDeadError,
    OmniError,
    UnknownAdapterError,
)
from vllm_omni.replicas.control import PoolControl
from vllm_omni.replicas.replica import Replica, ReplicaEngine
from vllm_omni.replicas.request import PoolRequest
from vllm_omni.replicas.routing import Asked, Load

AHEAD = 1  # requests that wait at an engine, so that none stands still until the front has heard of a place

Choice = Callable[[Sequence[Load], Asked, random.Random], int | None]


class Line:
    """`place` waits for an engine; `move` is to be called whenever one may have a place."""

    def __init__(self, replicas: list[Replica], control: PoolControl, seqs: int, choice: Choice) -> None:
        self._replicas, self._control = replicas, control
        self._room, self.choice = seqs + AHEAD, choice
        self._waiting: list[PoolRequest] = []
        self._draw = random.Random()
        self._planner: ReplicaEngine | None = None  # the last that was able to take any: it plans though it has gone
        self.waited_s = 0.0  # of all that have got a place
        self._promised = 0.0  # when the last request that was refused may come back

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[PoolRequest]:
        return iter(list(self._waiting))

    @property
    def seconds(self) -> float:
        """What those that wait would take, each with an engine to itself, also while no engine is there."""
        self._able()
        if (planner := self._planner) is None:
            return 0.0
        return sum(planner.planned(request.params)[0] for request in self._waiting)

    def retry_after_s(self) -> float:
        """Seconds until there should be room for one more that is refused now, at least one."""
        if not (there := self._able() or self._replicas):
            return 5.0
        left = [seconds for one in there for seconds, _ in one.weighed().jobs]
        queued = (self.seconds + sum(left)) / len(there)
        now, each = time.monotonic(), queued / max(1, len(left) + len(self))
        self._promised = come_back(now, self._promised, each, queued)
        return max(1.0, self._promised - now)

    def calm(self) -> None:
        """Note that nothing is in flight: there is room for whoever comes back."""
        self._promised = 0.0

    async def place(self, request: PoolRequest) -> Replica:
        """The replica that is to take it, with a place kept there. A new request that none can take is refused.

        Raises why: EngineDeadError, EngineAsleepError, UnknownAdapterError, or DeadlineExceededError after waiting.
        """
        if not request.accepted and not self._able():
            raise await self._why_none()
        request.accepted = True
        place = request.place = asyncio.get_running_loop().create_future()
        insort(self._waiting, request, key=_turn)
        replica: Replica | None = None
        since = time.monotonic()
        try:
            self.move()
            async with asyncio.timeout(request.left_s):
                replica = await place
        except TimeoutError:
            late = f"request {request.request_id} did not end within its time-out; it had not begun"
            raise DeadlineExceededError(late) from None
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
            if replica is None:
                request.give_up()
        if replica is None:
            raise await self._why_none()
        self.waited_s += time.monotonic() - since
        return replica

    def move(self) -> None:
        """Send those that wait, in their order, as far as there are places."""
        if self._replicas and all(one.engine.state == "dead" for one in self._replicas):
            for request in self:
                self._settle(request, None)
        for request in self:
            if request.settled:
                continue  # aborted: it leaves the line by itself
            able = self._able()
            if not (free := [one for one in able if one.held < self._room]):
                return
            there = frozenset[str]().union(*(one.engine.condition.adapters for one in able))
            alive = [one for one in self._replicas if one.engine.state != "dead"]
            holders = [one for one in alive if request.adapters <= one.engine.condition.adapters.keys()]
            if holders and not any(one in able for one in holders):
                continue  # the one that has it is being restarted, or has something to do first
            if not holders:
                names = ", ".join(sorted(request.adapters))
                fix = "must be loaded" + (", all of them by one replica" if request.adapters <= there else "")
                self._settle(request, UnknownAdapterError("lora_request", names, fix))
                continue
            seconds, pixels = self._planned(request, able)
            loads = [one.weighed() for one in free if one.name not in request.refused_by]
            index = self.choice(loads, Asked(seconds, pixels, request.adapters), self._draw)
            if index is not None:
                replica = [one for one in free if one.name not in request.refused_by][index]
                replica.coming[request] = seconds, pixels
                self._settle(request, replica)

    def _settle(self, request: PoolRequest, answer: Replica | OmniError | None) -> None:
        self._waiting.remove(request)
        request.settle(answer)

    def _able(self) -> list[Replica]:
        weights = self._control.weights
        able = [replica for replica in self._replicas if replica.able(weights)]
        if able:
            self._planner = able[0].engine
        return able

    def _planned(self, request: PoolRequest, able: Sequence[Replica]) -> tuple[float, int]:
        """Its seconds, as the engines plan it on average, and its pixels; one that has measured nothing learns how."""
        measured = next((one.engine.ledger.costs for one in able if one.engine.ledger.costs.computed), None)
        if measured is not None:
            for one in able:
                one.engine.ledger.assume(measured)
        planned = [one.engine.planned(request.params) for one in able]
        return sum(seconds for seconds, _ in planned) / len(planned), planned[0][1]

    async def _why_none(self) -> OmniError:
        """Why no replica takes a request, and when one should."""
        states = {replica.engine.state for replica in self._replicas}
        if not states:
            return EngineDeadError("no engine is there yet", retry_after_s=5.0)
        if "asleep" in states and "starting" not in states:
            return EngineAsleepError()
        if "ready" in states:
            return EngineDeadError("the engines are being brought to one condition", retry_after_s=1.0)
        excuses = []
        for replica in list(self._replicas):
            try:
                await replica.engine.check_health()
            except EngineDeadError as error:
                excuses.append(error)
        if not excuses:
            return EngineDeadError("the engines have just come back", retry_after_s=1.0)
        back = [error for error in excuses if error.retry_after_s is not None]
        return min(back, key=lambda error: error.retry_after_s or 0.0) if back else excuses[0]


def _turn(request: PoolRequest) -> float:
    return request.turn
