"""The engine: composes scheduler and worker. The loop is `step`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm_omni.diffusion.cache.plan.compose import expected_forwards
from vllm_omni.diffusion.cache.settings import CacheSettings
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.scheduler import StepKind, StepScheduler
from vllm_omni.diffusion.worker.coroutine import Failed, Finished
from vllm_omni.diffusion.worker.request import PlanOf, Request
from vllm_omni.diffusion.worker.worker import DiffusionWorker
from vllm_omni.errors import (
    DeviceLostError,
    EngineAsleepError,
    EngineClosedError,
    InvalidValueError,
    RequestAbortedError,
    refusal,
)
from vllm_omni.kernels.device import Mark, current, is_lost, lost_by, tried
from vllm_omni.kernels.timing import RemainingWork, StepReport, Timings
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.made import fill
from vllm_omni.outputs.usage import text_tokens

KEPT_REPORTS = 1024  # of steps, until somebody asks
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of denoisers, which several engines may serve
AWAIT_S = 0.05  # for what runs elsewhere, with nothing else to do; commands wait as long
GUESSED_STEPS = 50  # of a request that names none, until its schedule is known: what most pipelines take


@dataclass
class _Entry:
    """A request in the engine: as asked, as checked, and (once admitted) as it runs."""

    request: OmniDiffusionRequest
    arguments: dict[str, Any]
    settings: CacheSettings | None
    arrived: float = field(default_factory=time.perf_counter)
    running: Request | None = None
    plan_of: PlanOf | None = None  # a trial's; nobody else's
    seed: int | None = None
    peak: int = 0  # the most bytes of the device in use while it ran
    calls: int = 0  # denoiser calls made for it; more than its steps if guidance needs two

    @property
    def pixels(self) -> int:
        """Of one picture; 0 if only the pipeline knows."""
        return (self.arguments.get("height") or 0) * (self.arguments.get("width") or 0)


class DiffusionEngine:
    """Continuous batching at denoise-step level; one thread must make all calls."""

    def __init__(
        self, config: OmniDiffusionConfig, pipeline: Any = None, defaults: dict[str, Any] | None = None
    ) -> None:
        self.config = config
        self.worker = DiffusionWorker(config)
        self.worker.load_model(pipeline, defaults)
        offloads = bool(vars(self.worker.pipeline).get("_all_hooks"))  # by us, or by whoever made the pipeline
        self.scheduler = StepScheduler(config.max_num_seqs, components_last=offloads)
        modules = sorted((denoiser.module for denoiser in self.worker.runner.denoisers.values()), key=id)
        self._turns = [_locks.setdefault(module, RLock()) for module in modules]
        self._entries: dict[str, _Entry] = {}
        self._ended: list[OmniRequestOutput] = []
        self._closed = False
        self.asleep = False
        self.worked = False  # something ran in the last step
        self._reports: deque[StepReport] = deque(maxlen=KEPT_REPORTS)
        self._lost: DeviceLostError | None = None

    def add_request(self, request: OmniDiffusionRequest, priority: int = 0, arrived: float | None = None) -> None:
        """Queue a request. Everything that can be refused is refused here, and costs nobody else anything.

        Lower `priority` runs earlier; `arrived` (``time.monotonic()``) is when the waiting began, now if None.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self.asleep:
            raise EngineAsleepError
        if self._lost is not None:
            raise DeviceLostError(f"{self._lost}; make a new engine in another process")
        if not request.request_id or request.request_id in self._entries:
            raise InvalidValueError("request_id", request.request_id, "must be new and not empty")
        arguments, settings = self.worker.check(request)
        self._entries[request.request_id] = _Entry(request, arguments, settings)
        self.scheduler.add(request.request_id, priority, time.monotonic() if arrived is None else arrived)

    def try_out(self, request: OmniDiffusionRequest, plan_of: PlanOf) -> None:
        """Run `request` with a plan of its own whenever the engine has nothing else to do. It counts nowhere."""
        arguments, _ = self.worker.check(request)
        entry = _Entry(request, arguments, self.worker.default_cache, plan_of=plan_of)
        self._entries[request.request_id] = entry
        self.scheduler.fill(request.request_id)
        with self._turn():
            self._start(entry)

    def step(self) -> list[OmniRequestOutput]:
        """Admit, run one batch, and return the requests that ended.

        DeviceLostError if the device is of no use any more: no request can be run, and those in flight only be aborted.
        """
        with self._losing():
            with self._turn():
                self._step()
            if not self.worked:
                self.worker.runner.components.beside.wait(AWAIT_S)
        return self.collect()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Within, an error after which the device is of no use is DeviceLostError, and the engine knows."""
        try:
            yield
        except Exception as error:
            if not is_lost(error):
                raise
            self._lost = lost_by(error)
            self.worker.runner.clock.abandon()
            raise self._lost from None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Within, pipelines run, and no other engine over the same denoisers does, in whatever thread."""
        with torch.inference_mode(), current(self.worker.runner.device), ExitStack() as held:
            for lock in self._turns:
                held.enter_context(lock)
            yield

    def _step(self) -> None:
        began = self.worker.runner.clock.mark()
        self._take_back()
        admitted = [self._entries[request_id] for request_id in self.scheduler.admit()]
        if admitted and self.worker.store.budget is not None:  # theirs is the room: a trial that keeps any begins again
            self.abort([i for i in self.scheduler.idle if (trial := self._entries[i].running) and trial.plan])
        for entry in admitted:
            self._start(entry)
        started = [entry.running.times for entry in admitted if entry.running is not None]
        stateful = any(denoiser.keeps_state for denoiser in self.worker.runner.denoisers.values())
        entries = [self._entries[request_id] for request_id in self.scheduler.schedule(one_by_one=stateful)]
        batch = [entry.running for entry in entries if entry.running is not None]
        if batch and (fit := self.worker.runner.retries.at_once(batch)) < len(batch):
            self.scheduler.postpone([entry.request.request_id for entry in entries[fit:]])
            entries, batch = entries[:fit], batch[:fit]
        self.worked = bool(batch)
        looked = any(request.parked is not None and request.parked.signal is not None for request in batch)
        rows = self._run(entries[0].pixels, batch, began, started) if batch else 0
        for entry, request in zip(entries, batch, strict=True):
            entry.calls += rows > 0 and not looked
            self._settle(request)

    def _take_back(self) -> None:
        """Go on with requests whose text encoder or decoder has run elsewhere."""
        clock = self.worker.runner.clock
        for request in self.worker.runner.components.take_back():
            if isinstance(request.ended, Finished) and request.plan_of is None:
                pixels, times = self._entries[request.request_id].pixels, request.times
                clock.later(clock.mark(), partial(self._note_end, pixels, times))
            self._settle(request)

    def _note_end(self, pixels: int, times: Timings) -> None:
        self._reports.append(StepReport(pixels, ended=1, coding_s=times.coding_s))

    def _start(self, entry: _Entry) -> None:
        """Begin a request, whose own fault is whatever goes wrong in it."""
        self._note_peak()
        asked = entry.request, entry.arguments, entry.settings, entry.plan_of
        begun, error = tried(partial(self.worker.start, *asked))
        if begun is not None:
            entry.running, entry.seed = begun
            self._settle(entry.running)
        elif error is not None:
            self._end(entry, Failed(error))

    def _run(self, pixels: int, batch: Sequence[Request], began: Mark, started: Sequence[Timings]) -> int:
        """Run one batch; what no single request's call has raised ends all of the batch, and nobody else.

        A forward costs the whole turn, which `began` with requests that `started`, but for what is known as coding.
        Returns the rows of its forward.
        """
        kind, rows = batch[0].parked, sum(request.rows for request in batch)
        skipped, clock = kind is not None and kind.kind is StepKind.SKIP, self.worker.runner.clock
        decoded = [request.times.decode_s for request in batch]
        _, error = tried(partial(self.worker.runner.run, batch))
        if error is not None:
            for request in batch:
                if request.ended is None:
                    self.worker.runner.abort(request, error)
        ended, times = clock.mark(), [request.times for request in batch]
        finished = [request.times for request in batch if isinstance(request.ended, Finished)]

        def report() -> None:  # holds no request: one that has ended holds its picture
            coded = sum(one.decode_s for one in times) - sum(decoded) + sum(one.encode_s for one in started)
            seconds, coding = clock.seconds(began, ended) - coded, sum(one.coding_s for one in finished)
            self._reports.append(StepReport(pixels, rows, skipped, seconds, len(finished), coding))

        if batch[0].plan_of is None:
            clock.later(ended, report)
        return rows

    def reports(self) -> list[StepReport]:
        """The steps that the device has done since they were last asked for. DeviceLostError as of `step`."""
        with self._losing():
            self.worker.runner.clock.poll()
        reports = list(self._reports)
        self._reports.clear()
        return reports

    def collect(self) -> list[OmniRequestOutput]:
        """The requests that ended since they were last asked for; aborted ones end without a step."""
        ended, self._ended = self._ended, []
        return ended

    def abort(self, request_ids: Sequence[str], reason: Exception | None = None) -> None:
        """End requests between two steps; each still gives an output, whose error says so. Unknown ids are ignored.

        `reason` is that error, RequestAbortedError if None.
        """
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is None:
                continue
            error = self._lost or reason or RequestAbortedError(f"request {request_id} was aborted")
            if entry.running is None or self._lost is not None:
                self._end(entry, Failed(error))
            else:
                with self._turn():
                    self.worker.runner.abort(entry.running, error)
                self._settle(entry.running)

    def has_unfinished_requests(self) -> bool:
        """Also while something runs elsewhere that a request has left behind."""
        return bool(self._entries) or bool(self._ended) or len(self.worker.runner.components.beside) > 0

    def stage(self, request_id: str) -> str | None:
        """Where a request is between two steps: "queued", "encode" (not denoised yet), "denoise" or "decode".

        None: it has ended.
        """
        if (entry := self._entries.get(request_id)) is None:
            return None
        if entry.running is None:
            return "queued"
        if not entry.calls:
            return "encode"
        parked = entry.running.parked
        return "decode" if parked is not None and parked.kind is StepKind.COMPONENT else "denoise"

    def adapters_in_use(self) -> set[str]:
        """Those of all unfinished requests."""
        return {name for entry in self._asked() for name, _ in entry.request.params.lora_request or ()}

    def _asked(self) -> list[_Entry]:
        """Everything in the engine that somebody has asked for."""
        return [entry for entry in self._entries.values() if entry.plan_of is None]

    def remaining_work(self) -> list[RemainingWork]:
        """What every unfinished request still needs."""
        return [_remaining_work(entry) for entry in self._asked()]

    def progress_steps(self) -> tuple[int, int]:
        """Steps computed and skipped by those that run, so far."""
        done = [entry.running.done for entry in self._asked() if entry.running is not None]
        return sum(computed for computed, _ in done), sum(skipped for _, skipped in done)

    def progress(self, previews_only: bool = False) -> list[OmniRequestOutput]:
        """Where every admitted request stands, or those alone that have a new preview, which comes once."""
        return [
            OmniRequestOutput(
                entry.request.request_id,
                entry.request.prompt,
                images=running.previews.take(),
                finished=False,
                seed=entry.seed,
                step=running.step,
                num_inference_steps=running.schedule.steps if running.schedule is not None else None,
                computed_steps=running.done[0],
                skipped_steps=running.done[1],
            )
            for entry in self._asked()
            if (running := entry.running) is not None and (running.previews.images or not previews_only)
        ]

    def close(self) -> None:
        """Abort what runs, and leave the pipeline as it was."""
        if not self._closed:
            self.abort(list(self._entries))
            self._ended.clear()
            self.worker.close()
            self._closed = True

    def _settle(self, request: Request) -> None:
        """A request that has just advanced either parked again or ended."""
        if request.ended is not None:
            self._end(self._entries[request.request_id], request.ended)
        elif request.parked is not None:
            self.scheduler.park(request.request_id, request.parked.key, request.parked.kind)
            if request.away:
                self.scheduler.leave(request.request_id)

    def _note_peak(self) -> None:
        """Before a request joins those that run, or leaves them: the bytes until now were theirs."""
        peak = self.worker.runner.memory.peak() if self._lost is None else 0
        for entry in self._entries.values():
            if entry.running is not None:
                entry.peak = max(entry.peak, peak)

    def _end(self, entry: _Entry, event: Finished | Failed) -> None:
        self._note_peak()
        del self._entries[entry.request.request_id]
        self.scheduler.remove(entry.request.request_id)
        self._ended.append(_output(entry, event, self.worker))


def _remaining_work(entry: _Entry) -> RemainingWork:
    running, settings = entry.running, entry.settings
    rows: float = entry.arguments.get("num_images_per_prompt") or 1
    steps = entry.arguments.get("num_inference_steps") or GUESSED_STEPS
    done = 0
    if running is not None:
        if running.schedule is not None:
            steps = running.schedule.steps
        done = running.step
        rows = running.rows or rows
        rows *= max(1.0, entry.calls / max(1, done)) if done > 1 else 1.0
    left = steps - done
    if running is not None and running.plan is not None:
        computed = sum(running.plan[done:])
    else:
        computed = left if settings is None else round(left * expected_forwards(settings, steps) / steps)
    ours = entry.request.request_id, entry.pixels, running is not None, settings is not None
    return RemainingWork(*ours, computed * rows, (left - computed) * rows)


def _output(entry: _Entry, event: Finished | Failed, worker: DiffusionWorker) -> OmniRequestOutput:
    output = OmniRequestOutput(entry.request.request_id, entry.request.prompt, seed=entry.seed)
    running = entry.running
    if running is not None:
        output.num_inference_steps = running.schedule.steps if running.schedule is not None else None
        output.step = (output.num_inference_steps or 0) if isinstance(event, Finished) else running.step
        output.computed_steps, output.skipped_steps = running.done
        output.plan = running.plan
        output.cache_settings = dict(running.cache.settings) if running.cache.settings is not None else None
    output.peak_memory_mb = entry.peak / 2**20
    if isinstance(event, Failed):
        output.error = event.error if output.step else refusal(event.error, entry.arguments)
    else:
        latent, rates = entry.arguments["output_type"] == "latent", worker.arguments.rates
        fps = rates.of(entry.request.params.fps, entry.arguments)
        put = partial(fill, output, event.output, latent, fps, rates.audio_rate)
        _, error = tried(put)  # whatever a pipeline returns is its request's
        output.error = error or output.error
        worker.runner.clock.poll()  # a result that was looked at is there, and so are all times before it
    output.metrics = {"total_s": time.perf_counter() - entry.arrived, "text_tokens": 0}
    if running is not None:
        tokens, _ = tried(partial(text_tokens, worker.pipeline, entry.arguments))
        output.metrics["text_tokens"] = tokens or 0
        output.stage_durations = {
            "queue_s": running.times.started - entry.arrived,
            "encode_and_denoise_s": running.times.encode_and_denoise_s,
            "decode_s": running.times.decode_s,
        }
    return output
