"""An engine in another process, wherever that is: what its front sees of it, and what it is hosted by there.

Both ends speak the frames of `engine/wire.py`; a `Link` carries them. Knows no transport.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.interface import EngineCondition, EngineLoad, EngineStats, ModelInfo
from vllm_omni.engine.ledger import Ledger, RequestSize
from vllm_omni.engine.pictures import SharedPicture
from vllm_omni.engine.wire import (
    HEADER,
    Action,
    Add,
    Control,
    Controlled,
    EngineEvent,
    Loaded,
    Outputs,
    Refused,
    StateReport,
    decode_command,
    decode_event,
    encode,
    given_parameters,
)
from vllm_omni.errors import EngineDeadError, InvalidValueError, OmniError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logger import init_logger, told
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.replicas.kept import KeptTask
from vllm_omni.replicas.stats import counters_of

logger = init_logger(__name__)

REPORT_EVERY_S = 0.25
SILENCE_S = 15.0  # with neither a report nor an output, until an engine counts as dead
_LISTENS = 5  # times within `SILENCE_S`; a front that stood still has listened once
WATCH_AGAIN_S = 1.0  # after reports have ended


class LinkLostError(Exception):
    """The other end does not answer any more."""


class Link(Protocol):
    """Carries frames to an `EngineHost` and back. Every method may raise LinkLostError."""

    async def describe(self) -> bytes: ...

    def watch(self) -> AsyncGenerator[bytes, None]: ...

    def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]: ...

    async def control(self, frame: bytes) -> bytes: ...

    async def abort(self, request_ids: list[str]) -> None: ...

    def close(self) -> None: ...


class EngineHost:
    """An engine where it runs: takes frames and answers with frames."""

    def __init__(self, engine: ProcessEngineClient) -> None:
        self.engine = engine

    async def describe(self) -> bytes:
        return bytes(encode(Loaded(self.engine.info, self.engine.condition)))

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """A report every so often, for as long as somebody listens."""
        while True:
            engine = self.engine
            yield bytes(encode(StateReport(engine.state, engine.condition, await engine.report())))
            await asyncio.sleep(REPORT_EVERY_S)

    async def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        """The outputs of an `Add`; leaving the iterator aborts it within one step."""
        add = decode_command(frame[HEADER.size :])
        assert isinstance(add, Add)
        try:
            params = OmniDiffusionSamplingParams(**add.params)
            stream = self.engine.generate(
                add.prompt, params, add.request_id, priority=add.priority, timeout_s=timeout_s, salt=add.salt
            )
            async with aclosing(stream) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    output.prompt = None  # known to whoever asked
                    yield _answer(output)
        except OmniError as error:
            yield bytes(encode(Refused(add.request_id, error)))

    async def control(self, frame: bytes) -> bytes:
        """The condition after a `Control`, and why it was not done."""
        control = decode_command(frame[HEADER.size :])
        assert isinstance(control, Control)
        error: OmniError | None = None
        try:
            await self.engine.control(control.action)
        except OmniError as raised:
            error = raised
        return bytes(encode(Controlled(control.control_id, self.engine.condition, error)))

    async def abort(self, request_ids: list[str]) -> None:
        await self.engine.abort(request_ids)


class RemoteEngine:
    """The `ReplicaEngine` of an `EngineHost` at the other end of a link.

    `changed` is called when its state changes, `freed` when a report has fewer requests than before.
    """

    def __init__(
        self, link: Link, changed: Callable[[], None] = lambda: None, freed: Callable[[], None] = lambda: None
    ) -> None:
        self._link, self.changed, self._freed = link, changed, freed
        self._info: ModelInfo | None = None
        self.condition = EngineCondition()
        self.state = "starting"
        self.ledger = Ledger()
        self._jobs: dict[str, tuple[float, int]] = {}  # as last reported, of all fronts, without those that ended here
        self._sizes: dict[str, RequestSize] = {}
        self._stats = EngineStats()
        self._heard = 0.0
        self._watching: KeptTask | None = None

    async def start(self) -> None:
        """Return once it has described its model; EngineDeadError if it does not answer."""
        try:
            loaded = _event(await self._link.describe())
        except LinkLostError as error:
            raise EngineDeadError(f"an engine does not answer: {error}") from None
        assert isinstance(loaded, Loaded)
        self._info, self.condition = loaded.info, loaded.condition
        self.state, self._heard = "asleep" if self.condition.asleep else "ready", time.monotonic()
        self._watching = KeptTask(self._watch, WATCH_AGAIN_S, "listening to a replica")

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise EngineDeadError("the engine has not loaded its model yet")
        return self._info

    @property
    def ready(self) -> bool:
        return self.state == "ready" and time.monotonic() - self._heard <= SILENCE_S

    @property
    def load(self) -> EngineLoad:
        """With what was sent a moment ago, and with what other fronts have sent."""
        ours = {name: self.ledger.seconds(size) for name, size in self._sizes.items() if name not in self._jobs}
        jobs = [*self._jobs.values(), *((seconds, self._sizes[name].pixels) for name, seconds in ours.items())]
        return EngineLoad(tuple(jobs), self.ledger.load({}).unshared)

    def planned(self, params: OmniDiffusionSamplingParams) -> tuple[float, int]:
        size = RequestSize.of(params, self.info.defaults)
        return self.ledger.seconds(size), size.pixels

    async def generate(
        self,
        prompt: Any,
        sampling_params: OmniDiffusionSamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> AsyncIterator[OmniRequestOutput]:
        """See `EngineClient`."""
        if sampling_params.generator is not None:
            raise InvalidValueError("generator", "given", "cannot cross to the engine's process; give a seed")
        add = Add(request_id, _that_travels(prompt), given_parameters(sampling_params), priority, 0.0, None, salt)
        frame = bytes(encode(add))
        self._sizes[request_id] = RequestSize.of(sampling_params, self.info.defaults)
        ended = False
        try:
            async with aclosing(self._while_heard(self._link.generate(frame, timeout_s))) as frames:
                async for answer in frames:
                    for output in _outputs(answer):
                        output.request_id, output.prompt = request_id, prompt
                        ended = output.finished
                        if isinstance(output.error, EngineDeadError):
                            self._note_lost()  # its process: until the next report
                        yield output
            lost = "without an answer"
        except EngineDeadError as error:  # of a process that is not there, in a replica that is
            lost = f"({error})"
            self._note_lost()
        except LinkLostError as error:
            lost = f"({error})"
            self._note_lost()
        finally:
            del self._sizes[request_id]
            self._jobs.pop(request_id, None)
            if self.state == "dead" and not self._sizes and self._watching is not None:
                self._watching.cancel()  # it has left, and has ended what it had
        if not ended:
            dead = EngineDeadError(f"the replica ended {lost} while the request was in flight", 5.0)
            yield OmniRequestOutput(request_id, prompt, error=dead)

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        if known := [one for one in ids if one in self._sizes]:
            await self._carried(self._link.abort(known))

    async def control(self, action: Action) -> EngineCondition:
        """See `EngineClient`."""
        answer = _event(await self._carried(self._link.control(bytes(encode(Control("0", action))))))
        assert isinstance(answer, Controlled)
        self.condition = answer.condition
        if self.state in ("ready", "asleep"):
            self.state = "asleep" if self.condition.asleep else "ready"
        if answer.error is not None:
            raise answer.error
        return self.condition

    async def check_health(self) -> None:
        if self.state not in ("ready", "asleep"):
            raise EngineDeadError(f"the replica is {self.state}", 5.0)
        if time.monotonic() - self._heard > SILENCE_S:
            raise EngineDeadError("the replica does not answer", 5.0)

    async def stats(self) -> EngineStats:
        return self._stats

    async def drain(self, timeout_s: float) -> None:
        """Whoever started it ends it."""

    async def shutdown(self) -> None:
        """Ask nothing more of it, and listen until what it has is done."""
        self.state = "dead"
        self._link.close()
        if self._watching is not None and not self._sizes:
            await self._watching.end()

    async def _carried(self, call: Any) -> Any:
        try:
            return await call
        except LinkLostError as error:
            self._note_lost()
            raise EngineDeadError(f"the replica does not answer ({error})", 5.0) from None

    async def _while_heard(self, frames: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The frames; LinkLostError after `SILENCE_S` without a sound: a link may wait for ever for a lost machine."""
        async with aclosing(frames):
            while True:
                following = asyncio.ensure_future(anext(frames, None))
                try:
                    await self._awaited(following)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait([following])
                if (frame := following.result()) is None:
                    return
                yield frame

    async def _awaited(self, following: asyncio.Future[bytes | None]) -> None:
        """Return once it has come; reports that come meanwhile are heard, too."""
        silent, heard = 0, self._heard
        while not following.done():
            if silent == _LISTENS:
                raise LinkLostError(f"nothing was heard for {SILENCE_S:g} s")
            await asyncio.wait([following], timeout=SILENCE_S / _LISTENS)
            silent, heard = silent + 1 if heard == self._heard else 0, self._heard

    async def _watch(self) -> None:
        """Note reports; when they end, ask for more until `shutdown`: a link may be lost for a moment."""
        while self.state != "dead":
            try:
                async with aclosing(self._while_heard(self._link.watch())) as frames:
                    async for frame in frames:
                        self._note(_event(frame))
            except LinkLostError as error:
                if self.state != "starting":  # it is told once
                    logger.warning("a replica is lost: %s", error)
            except (ValueError, AssertionError) as error:
                logger.error("a report of a replica cannot be read:\n%s", told(error))
            self._note_lost()
            await asyncio.sleep(WATCH_AGAIN_S)

    def _note_lost(self) -> None:
        """Ask it nothing before it reports again; whoever started it starts another one, if it is dead."""
        if self.state not in ("dead", "starting"):
            self.state, self._stats = "starting", counters_of(self._stats)
            self.changed()

    def _note(self, event: EngineEvent) -> None:
        assert isinstance(event, StateReport)
        before, self._heard = self.state, time.monotonic()
        if before == "dead":
            return  # it has left, and ends what it has
        self.state = "starting" if event.state == "dead" else event.state  # whoever started it replaces it
        self.condition, report = event.condition, event.report
        self.ledger.note(report)
        held, self._stats = len(self._jobs), report.stats
        self._info = None if self._info is None else self._info.with_profiles(report.stats.profiles)
        self._jobs = dict(report.jobs) if report.costs.computed else {}
        if self.state != before:
            self.changed()
        elif len(self._jobs) < held:
            self._freed()


def _answer(output: OmniRequestOutput) -> bytes:
    try:
        return bytes(encode(Outputs([output])))
    except InvalidValueError as error:  # a result too long to send: its request alone fails
        failed = OmniError(f"the result could not be sent: {error}")
        return bytes(encode(Outputs([OmniRequestOutput(output.request_id, error=failed)])))


def _event(frame: bytes) -> EngineEvent:
    return decode_event(frame[HEADER.size :])


def _outputs(frame: bytes) -> list[OmniRequestOutput]:
    """The outputs of a frame; raises what a `Refused` says."""
    event = _event(frame)
    if isinstance(event, Refused):
        raise event.error
    assert isinstance(event, Outputs)
    return event.outputs


def _that_travels(prompt: Any) -> Any:
    """The prompt with pictures in it instead of places in this machine's memory."""
    media = prompt.get("multi_modal_data") if isinstance(prompt, dict) else None
    if not isinstance(media, dict):
        return prompt

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(one) for one in value]
        return value.image() if isinstance(value, SharedPicture) else value

    return prompt | {"multi_modal_data": {name: own(value) for name, value in media.items()}}
