"""What an operator does to a pool is done to all of its engines: adapters, sleep, weights, traces."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vllm_omni.engine.interface import EngineCondition
from vllm_omni.engine.wire import Action, LoadAdapter, Sleep, UnloadAdapter, UpdateWeights
from vllm_omni.errors import EngineDeadError, OmniError
from vllm_omni.logger import init_logger
from vllm_omni.replicas.replica import Replica

logger = init_logger(__name__)


class PoolControl:
    """Does an action to every replica, one action after another. What the first one refuses is done to none.

    Those that are starting do it once they have started, before they take a request. One that cannot do what the
    others did is logged and reported as it is: it gets no request that needs what it lacks, and none at all if its
    weights are not those of the others.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._order = asyncio.Lock()
        self.weights: dict[str, str] = {}  # component -> the folder of its last update, the latest last

    @property
    def condition(self) -> EngineCondition:
        """Of all together: the adapters that any has, the sleep of the one that sleeps least."""
        every = [replica.engine.condition for replica in self._replicas]
        started = [one.engine.condition for one in self._replicas if one.engine.state in ("ready", "asleep")] or every
        return EngineCondition(
            adapters={name: path for one in every for name, path in one.adapters.items()},
            weights=self.weights,
            asleep=min((one.asleep for one in started), default=0),
            profiling=any(one.profiling for one in every),
        )

    async def do(self, action: Action) -> EngineCondition:
        """The condition after it; raises why the first replica refused it, or why all did."""
        async with self._order:
            able = [one for one in self._replicas if one.engine.state in ("ready", "asleep") and not one.missed]
            if not able:
                raise EngineDeadError("no engine is there that could do it", retry_after_s=5.0)
            careful = isinstance(action, LoadAdapter | UnloadAdapter | UpdateWeights)
            absent = [one for one in self._replicas if one not in able]
            for replica in absent:  # before anything is awaited: it may start meanwhile
                replica.missed.append(action)
            if careful:
                try:
                    after = await able[0].engine.control(action)
                except OmniError:
                    for replica in absent:  # one that has started has done it, or refused it itself
                        replica.forget(action)
                    raise
                if isinstance(action, UpdateWeights):
                    self.weights = after.weights
            rest = able[1:] if careful else able
            errors = await asyncio.gather(*(self._do(action, replica) for replica in rest))
            if not careful and None not in errors:
                raise next(error for error in errors if error is not None)
            for replica, error in zip(rest, errors, strict=True):
                if isinstance(error, EngineDeadError):
                    replica.missed.append(action)  # when it is back
                elif error is not None:
                    logger.error("replica %s has not done what the others did (%s): %s", replica.name, action, error)
            return self.condition

    def greet(self, replica: Replica) -> None:
        """Note what a replica that joins the others has to do to be like them; of the first, the others take over."""
        others = [one for one in self._replicas if one is not replica]
        started = [one for one in others if one.engine.state in ("ready", "asleep")]
        own = replica.engine.condition
        if not others and not self.weights:
            self.weights = own.weights
        if own.weights != self.weights:
            replica.missed += [UpdateWeights(folder, [name]) for name, folder in self.weights.items()]
        alike = [one for one in started if not one.missed] or others
        there = {name: path for one in alike for name, path in one.engine.condition.adapters.items()}
        if others:
            replica.missed += [UnloadAdapter(name) for name, path in own.adapters.items() if there.get(name) != path]
        replica.missed += [LoadAdapter(name, path) for name, path in there.items() if own.adapters.get(name) != path]
        if started and all(one.engine.state == "asleep" for one in started):
            replica.missed.append(Sleep(min(one.engine.condition.asleep for one in started) or 1))

    async def catch_up(self, replica: Replica) -> None:
        """Let a replica that has just started do what was done to the others meanwhile."""
        if replica.catches_up:
            return
        replica.catches_up = True
        try:
            while replica.missed:
                action = replica.missed[0]
                if (error := await self._do(action, replica)) is not None:
                    logger.error("replica %s could not do again %s: %s", replica.name, action, error)
                    if isinstance(error, EngineDeadError) or replica.engine.state not in ("ready", "asleep"):
                        return  # it has died again: when it is back
                if replica.missed and replica.missed[0] is action:  # else it has been taken back
                    replica.missed.popleft()
        finally:
            replica.catches_up = False

    @staticmethod
    async def _do(action: Action, replica: Replica) -> OmniError | None:
        try:
            await replica.engine.control(action)
        except OmniError as error:
            return error
        return None
