"""An `EngineClient` over an engine in a process of its own. One event loop makes all calls; no torch here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import Any, Self

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.engine.in_flight import InFlight, InFlightRequest, OutputOrError
from vllm_omni.engine.interface import MAX_QUEUED_REQUESTS, EngineCondition, EngineLoad, EngineStats, ModelInfo
from vllm_omni.engine.ledger import Ledger, RequestSize, outcome
from vllm_omni.engine.supervisor import EngineProcess, Launch, Restarts
from vllm_omni.engine.wire import (
    Abort,
    Action,
    Add,
    Controlled,
    EngineEvent,
    Loaded,
    Start,
    StartFailed,
    StatsReport,
    encode,
    given_parameters,
)
from vllm_omni.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    InvalidValueError,
    QueueFullError,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.settings import Settings

logger = init_logger(__name__)

WATCH_EVERY_S = 0.25
Place = tuple[int, int]  # which of several engines it is, and of how many
ALONE: Place = (0, 1)
STEP_TIMEOUT_S = 600.0
_LOADING = 20  # times the patience, while imports and weights keep the process silent


def launch_engine(
    engine_args: dict[str, Any],
    *,
    warmup: bool = True,
    log_json: bool = False,
    log_prompts: bool = False,
    heartbeat_s: float = 0.5,
    place: Place = ALONE,
    step_timeout_s: float = STEP_TIMEOUT_S,
) -> Launch:
    """Launch the engine process of a `ProcessEngineClient` with these settings; it loads while its front end does."""
    return Launch.of(_start_of(engine_args, warmup, heartbeat_s, step_timeout_s, log_json, log_prompts, place))


class ProcessEngineClient:
    """An `EngineClient`: `start` it (or `async with`), `generate`, `shutdown`. The thread that starts it must live on.

    `engine_args` are those of `OmniDiffusionConfig`. At most `max_num_seqs` requests run and `max_queued_requests`
    wait. An engine process that dies, is silent for `heartbeat_timeout_s`, or spends `step_timeout_s` in one step is
    ended and replaced, at most `max_restarts` times in `restart_window_s`. `launch` is the first one, if it was
    launched with the same settings already; with others it is ended. `place` is (which one, of how many) engines on
    this machine; `changed` is called when it has started, or will not start any more, and `freed` when a request has
    ended, also one that nobody waits for.
    """

    def __init__(
        self,
        engine_args: dict[str, Any],
        *,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        warmup: bool = True,
        log_json: bool = False,
        log_prompts: bool = False,
        heartbeat_s: float = 0.5,
        heartbeat_timeout_s: float = 15.0,
        step_timeout_s: float = STEP_TIMEOUT_S,
        max_restarts: int = 10,
        restart_window_s: float = 600.0,
        launch: Launch | None = None,
        place: Place = ALONE,
        changed: Callable[[], None] = lambda: None,
        freed: Callable[[], None] = lambda: None,
    ) -> None:
        config = OmniDiffusionConfig(**engine_args)  # raises what is wrong
        self._start = _start_of(engine_args, warmup, heartbeat_s, step_timeout_s, log_json, log_prompts, place)
        self._name = "the engine" if place == ALONE else f"replica {place[0]}"
        self._changed, self._freed = changed, freed
        if launch is not None and launch.start != self._start:
            launch.discard()
            launch = None
        self._launch = launch
        if max_queued_requests < 0:
            raise InvalidValueError("max_queued_requests", max_queued_requests, "must be 0 or more")
        self._limit = config.max_num_seqs + max_queued_requests
        self._max_num_seqs, self._heartbeat_s = config.max_num_seqs, heartbeat_s
        self._heartbeat_timeout_s, self._step_timeout_s = heartbeat_timeout_s, step_timeout_s
        self._restarts = Restarts(max_restarts, restart_window_s)
        self._requests = InFlight(self._send_abort, backlog=1, ended=self._note_end)
        self._engine: EngineProcess | None = None
        self._info: ModelInfo | None = None
        self.condition = EngineCondition()
        self._loaded = self._draining = self._closed = False
        self._dead = ""  # why no engine will come any more
        self._load_s, self._load_began = 10.0, 0.0  # how long the last start took, and when it began
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self.ledger = self._ledger = Ledger()  # what was counted, and what work costs

    async def start(self) -> Self:
        """Return once the model is loaded and warmed up; raises the engine's reason if it cannot."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._task is None:
            self._started = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._supervise())
            self._task.add_done_callback(self._unsupervised)
        assert self._started is not None
        await asyncio.shield(self._started)
        return self

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exception: object) -> None:
        await self.shutdown()

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise EngineDeadError("the engine has not loaded its model yet")
        return self._info

    @property
    def ready(self) -> bool:
        return self.state == "ready" and not self._draining

    @property
    def state(self) -> str:
        """The word of `ReplicaStats.state`."""
        if self._dead or self._closed:
            return "dead"
        if not self._loaded:
            return "starting"
        return "asleep" if self.condition.asleep or self._requests.fall_asleep else "ready"

    @property
    def load(self) -> EngineLoad:
        """What it has to do, with what was sent a moment ago."""
        return self._ledger.load(self._requests.named_sizes)

    def planned(self, params: OmniDiffusionSamplingParams) -> tuple[float, int]:
        """Seconds that a new request would take if it had the engine to itself, and its pixels."""
        size = RequestSize.of(params, self.info.defaults)
        return self._ledger.seconds(size), size.pixels

    def generate(
        self,
        prompt: Any,
        sampling_params: OmniDiffusionSamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> AsyncIterator[OmniRequestOutput]:
        """See `EngineClient`; all errors named there come at the first step of the iterator."""

        def begin(request: InFlightRequest) -> None:
            self._begin(request, sampling_params, priority, timeout_s, salt)

        return self._requests.stream(request_id, prompt, begin)

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        self._requests.abort(request_ids)

    async def control(self, action: Action) -> EngineCondition:
        """See `EngineClient`."""
        if self._closed or not self._loaded or (engine := self._engine) is None:
            raise EngineClosedError("the engine is closed") if self._closed else self._unavailable()
        return await self._requests.control(action, lambda control: engine.send(encode(control)))

    async def check_health(self) -> None:
        if not self._loaded or self._engine is None:
            raise self._unavailable()
        if not await self._engine.answers(max(2.0, 4 * self._heartbeat_s)):
            raise EngineDeadError("the engine process does not answer")

    async def stats(self) -> EngineStats:
        stats = self._ledger.stats(self._requests.sizes)
        return replace(stats, max_num_seqs=self._max_num_seqs, restarts=self._restarts.count)

    async def report(self) -> StatsReport:
        """Statistics, costs and jobs, for a front elsewhere."""
        return self._ledger.report(await self.stats(), self._requests.named_sizes)

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            logger.warning("%d requests had not ended after %.1f s of draining", len(self._requests), timeout_s)

    async def shutdown(self) -> None:
        if self._closed:
            return
        self._closed, self._loaded = True, False
        self._end_all(lambda i: EngineClosedError(f"request {i} was aborted: the engine shuts down"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._engine is not None:
            await self._engine.end(kill=False)
            self._engine = None
        if self._launch is not None:
            self._launch.discard()
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineClosedError("the engine was closed while it started"))

    def _begin(
        self,
        request: InFlightRequest,
        params: OmniDiffusionSamplingParams,
        priority: int,
        timeout_s: float | None,
        salt: str,
    ) -> None:
        """Refuse, in microseconds, what can be refused without asking the engine, and send the rest."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._draining:
            raise EngineDrainingError("the engine is shutting down and takes no new requests")
        if not self._loaded:
            raise self._unavailable()
        others = self._requests.sizes[:-1]
        if len(others) >= self._limit:
            raise QueueFullError(len(others) - self._max_num_seqs, self._ledger.retry_after_s(others))
        if not isinstance(priority, int) or priority.bit_length() > 31:
            raise InvalidValueError("priority", priority, "must be a whole number of at most 32 bits")
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise InvalidValueError("timeout_s", timeout_s, "must be a number of seconds above 0")
        if params.generator is not None:
            raise InvalidValueError("generator", "given", "cannot cross to the engine's process; give a seed")
        normalise_prompt(request.prompt)
        now = time.monotonic()
        deadline = None if timeout_s is None else now + timeout_s
        frame = encode(Add(request.engine_id, request.prompt, given_parameters(params), priority, now, deadline, salt))
        request.size = RequestSize.of(params, self.info.defaults)
        assert self._engine is not None
        self._engine.send(frame)
        self._empty.clear()

    def _send_abort(self, engine_ids: list[str]) -> None:
        if self._engine is not None:
            self._engine.send(encode(Abort(engine_ids)))

    def _unavailable(self) -> EngineDeadError:
        if self._dead:
            return EngineDeadError(self._dead)
        if self._task is None:
            return EngineDeadError("the engine has not been started")
        left = max(1.0, self._load_s - (time.monotonic() - self._load_began))
        return EngineDeadError("the engine process is being restarted", retry_after_s=left)

    async def _supervise(self) -> None:
        """One engine process after another, until shutdown or until restarting it makes no sense."""
        while not self._dead:
            self._load_began = time.monotonic()
            failure: Exception | None = None
            served = False
            try:
                if self._info is not None:
                    self._start.condition, self._start.costs = self.condition, self._ledger.costs  # as before
                launch, self._launch = self._launch or Launch.of(self._start), None
                self._load_began = launch.began
                self._engine = await EngineProcess.adopt(launch)
            except OSError as error:
                how = f"could not be started ({error.strerror})"
            else:
                watch = asyncio.create_task(self._watch(self._engine))
                try:
                    failure = await self._listen(self._engine)
                finally:
                    watch.cancel()
                    served, self._loaded = self._loaded, False
                    self._start.trials &= not served or len(self._requests) > 0  # else it was a trial, if anything
                how = await self._engine.end(kill=True)
            self._lost(how, failure)
            if (pause := self._pause(served)) is not None:
                await asyncio.sleep(pause)

    def _unsupervised(self, task: asyncio.Task[None]) -> None:
        """The supervisor itself has ended, by a fault of ours unless it was cancelled: nobody restarts the engine."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._loaded, self._dead = False, "the engine cannot be restarted any more; restart the server"
        logger.critical("the supervisor of %s's process failed", self._name, exc_info=error)
        self._end_all(lambda _: EngineDeadError(self._dead))
        self._changed()
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineDeadError(self._dead))

    async def _listen(self, engine: EngineProcess) -> Exception | None:
        """Handle events until the process ends; returns its reason if it could not start."""
        while (event := await engine.receive()) is not None:
            if isinstance(event, StartFailed):
                return event.error
            self._handle(event)
        return None

    async def _watch(self, engine: EngineProcess) -> None:
        """Kill a process that hangs: its end is then noticed like any other."""
        while True:
            slept = time.monotonic()
            await asyncio.sleep(WATCH_EVERY_S)
            if time.monotonic() - slept > 4 * WATCH_EVERY_S:
                continue  # this event loop stood still: read first what came meanwhile
            patience = self._heartbeat_timeout_s * (1 if self._loaded else _LOADING)
            if why := engine.hangs(patience, self._step_timeout_s):
                logger.error("%s's process %d hangs and is killed: %s", self._name, engine.process.pid, why)
                engine.process.kill()
                return

    def _lost(self, how: str, failure: Exception | None) -> None:
        """End the requests of a process that is gone, once each, and keep its counters."""
        if self._started is None or self._started.done():  # else `start` raises it
            ended = len(self._requests)
            reason = f": {failure}" if failure else ""
            logger.error("%s's process %s; %d requests end%s", self._name, how, ended, reason)
        text = f"the engine process {how} while the request was in flight"
        self._end_all(lambda _: EngineDeadError(text, retry_after_s=self._load_s))
        self._ledger.process_ended()
        if self._started is not None and not self._started.done():
            self._dead = str(failure) if failure else f"the engine process {how} while it loaded its model; see its log"
            self._started.set_exception(failure or EngineDeadError(self._dead))

    def _pause(self, served: bool) -> float | None:
        """Seconds until the next start, or None if there will be none; `_dead` is then the reason."""
        if self._dead:
            return None
        if self._draining:
            self._dead = "the engine process died while the server was shutting down"
            return None
        pause = self._restarts.pause(time.monotonic(), served)
        if pause is None:
            most, window = self._restarts.most, self._restarts.window_s
            self._dead = f"the engine process died more than {most} times within {window:.0f} s; restart the server"
            logger.critical("%s: %s", self._name, self._dead)
            self._changed()
        return pause

    def _handle(self, event: EngineEvent) -> None:
        if isinstance(event, Loaded):
            self._info, self.condition, self._loaded = event.info, event.condition, True
            self._load_s = time.monotonic() - self._load_began
            logger.info("%s is ready after %.1f s", self._name, self._load_s)
            if self._started is not None and not self._started.done():
                self._started.set_result(None)
            self._changed()
        elif isinstance(event, StatsReport):
            self._ledger.note(event)
            self._info = self.info.with_profiles(event.stats.profiles)
        else:
            if isinstance(event, Controlled):
                self.condition = event.condition
            self._requests.note(event)

    def _note_end(self, item: OutputOrError) -> None:
        self._ledger.outcomes[outcome(item if isinstance(item, Exception) else item.error)] += 1
        if not self._requests:
            self._ledger.calm()
            self._empty.set()
        self._freed()

    def _end_all(self, error_of: Callable[[str], Exception]) -> None:
        self._requests.end_all(lambda request_id: OmniRequestOutput(request_id, error=error_of(request_id)))


def _start_of(
    args: dict[str, Any], warmup: bool, beat_s: float, hang_s: float, as_json: bool, prompts: bool, place: Place
) -> Start:
    plain = {name: _plain(value) for name, value in args.items()}
    return Start(plain, warmup, beat_s, as_json, None, prompts, place[0], place[1], step_timeout_s=hang_s)


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if isinstance(value, Settings) else value
