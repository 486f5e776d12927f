"""Ranks in lock-step: each runs the whole engine, and does in every turn what rank 0 has said.

Who advances is decided by a scheduler without chance and without a clock, so that equal commands make equal steps. What
could differ is settled by rank 0 before it is sent: seeds, arrival times, deadlines, measured times. With every turn
comes a digest of what rank 0 is about to run. A rank that would run anything else ends, and the group with it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.distributed.group import Group
from vllm_omni.distributed.messages import Turn
from vllm_omni.distributed.pace import GroupPace
from vllm_omni.distributed.setup import abandon_group, check_devices, config_of, exchanges, join_group, leave_group
from vllm_omni.engine.control import EngineControl
from vllm_omni.engine.wire import (
    HEADER,
    Abort,
    Action,
    Add,
    Control,
    LoadAdapter,
    UnloadAdapter,
    decode_command,
    encode,
    given_parameters,
)
from vllm_omni.errors import ConflictError, DeviceLostError, InvalidValueError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.kernels.device import is_out_of_memory
from vllm_omni.outputs import OmniRequestOutput

SEED_BITS = 31


def open_engine(config: OmniDiffusionConfig, lost: Callable[[], None] | None = None) -> DiffusionEngine:
    """The engine that a configuration asks for, with the processes of all other ranks if there are several.

    `lost` is called, in a thread, if the group ends by itself and the engine may be unable to say so. Without it what
    waits for the other ranks is aborted then, and this process goes on.
    """
    return DiffusionEngine(config) if config.parallel_config.ranks == 1 else LeaderEngine(config, lost or abandon_group)


class LeaderEngine(DiffusionEngine):
    """Rank 0 of a group: an engine whose every turn the other ranks follow."""

    def __init__(self, config: OmniDiffusionConfig, lost: Callable[[], None]) -> None:
        check_devices(config)
        parallel, seed = config.parallel_config, secrets.randbits(SEED_BITS)
        self.group = Group(parallel.ranks, parallel.rank_timeout_s, lost)
        self._acts: list[Add | Abort | Control] = []
        self.turns = 0
        with ExitStack() as undo:
            undo.callback(leave_group)
            undo.callback(self.group.close)
            self.group.start(plain_arguments(config), seed)
            super().__init__(config_of(config, 0))
            denoisers = self.worker.runner.denoisers.items()
            self.group.meet({name: one.found for name, one in denoisers if one.written is None})
            join_group(self, 0, self.group.rendezvous, seed, self._alike)
            undo.pop_all()

    def add_request(self, request: OmniDiffusionRequest, priority: int = 0, arrived: float | None = None) -> None:
        """As of one device. What is left open is settled here, and the request read as all others will read it."""
        params = request.params
        if params.generator is not None:
            raise InvalidValueError("generator", "given", "cannot go to every rank; give a seed")
        if params.seed is None:
            params = params.model_copy(update={"seed": secrets.randbits(SEED_BITS)})  # torch's draw alike on all ranks
        arrived = time.monotonic() if arrived is None else arrived
        add = Add(request.request_id, request.prompt, given_parameters(params), priority, arrived, None, request.salt)
        command = decode_command(bytes(encode(add)[HEADER.size :]))
        assert isinstance(command, Add)
        super().add_request(asked(command), priority, arrived)
        self._acts.append(add)

    def try_out(self, request: OmniDiffusionRequest, plan_of: Any) -> None:
        raise ConflictError("a group of ranks makes no trials")

    def abort(self, request_ids: Sequence[str], reason: Exception | None = None) -> None:
        if known := [request_id for request_id in request_ids if self.stage(request_id) is not None]:
            self._acts.append(Abort(known))
            super().abort(known, reason)

    def acted(self, action: Action) -> None:
        """Have the other ranks do what was done to this one."""
        self._acts.append(Control("", action))

    def step(self) -> list[OmniRequestOutput]:
        """Send the turn, and do it. DeviceLostError if the group has come to its end."""
        pace = self.worker.runner.pace
        assert isinstance(pace, GroupPace)
        try:
            self.turns += 1
            news, acts, self._acts = pace.news(), self._acts, []
            pace.learn(news)
            self.group.tell(Turn(self.turns, acts, self.scheduler.held, news, digest_of(self)))
            self.group.keep_up(self.turns)
            ended = super().step()
            self.group.check()  # what was made while it came to its end may be of aborted exchanges
        except DeviceLostError as error:
            self._lost = error
            raise
        return ended

    def close(self) -> None:
        """End all ranks."""
        if not self._closed:
            super().close()
            self.group.close()
            leave_group()

    def _alike(self, error: Exception) -> bool:
        return self.group.fails_alike(told(error))


class GroupControl(EngineControl):
    """What can be done to all ranks alike: adapters come and go. The rest needs a restart."""

    def may_do(self, action: Action) -> bool:
        return not isinstance(action, LoadAdapter | UnloadAdapter) or super().may_do(action)  # `do` refuses at once

    def do(self, action: Action) -> None:
        if not isinstance(action, LoadAdapter | UnloadAdapter):
            raise ConflictError(f"{type(action).__name__} is for one device; restart the engine instead")
        assert isinstance(self._engine, LeaderEngine)
        if self._config.parallel_config.tensor_parallel_size > 1:
            raise ConflictError("adapters cannot be combined with tensor_parallel_size; ulysses_degree can")
        super().do(action)
        self._engine.acted(action)


def control_of(engine: DiffusionEngine) -> EngineControl:
    """What can be done to an engine between two steps."""
    return GroupControl(engine) if isinstance(engine, LeaderEngine) else EngineControl(engine)


def asked(add: Add) -> OmniDiffusionRequest:
    """The request that a command carries."""
    params = OmniDiffusionSamplingParams(**add.params)
    return OmniDiffusionRequest(add.request_id, add.prompt, normalise_prompt(add.prompt), params, add.salt)


def told(error: Exception) -> str:
    """What all ranks say of a failure that is the request's own; texts about memory name a device.

    And where: exchanges of accelerators are asked for before they are made, so that a rank can be ahead of others.
    """
    what = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error)[:200]}"
    return f"{what}, after {exchanges()} exchanges"


def digest_of(engine: DiffusionEngine) -> str:
    """What the next step will run, and what all steps have made so far, in a few characters."""
    scheduler = engine.scheduler
    places = [(name, place and (int(place.kind), place.since)) for name, place in scheduler.running.items()]
    state = (scheduler.waiting, scheduler.held, places, engine.progress_steps())
    work = [(need.request_id, need.computed, need.skipped) for need in engine.remaining_work()]
    return hashlib.blake2b(repr((state, work, engine.worker.cache_bytes)).encode(), digest_size=8).hexdigest()


def plain_arguments(config: OmniDiffusionConfig) -> dict[str, Any]:
    """The engine arguments as they cross to another process."""
    return config.model_dump(exclude_unset=True, exclude_none=True)
