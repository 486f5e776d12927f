"""Runs one scheduled batch of parked calls, and brings each request its rows: model, cache and batch meet here."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.guiders import BaseGuidance

from vllm_omni.diffusion.cache.base import StackBackend
from vllm_omni.diffusion.cache.forward import BatchRows, CachedForward, is_of_output, look
from vllm_omni.diffusion.cache.settings import CacheSettings
from vllm_omni.diffusion.cache.standalone import refuse_other_caches
from vllm_omni.diffusion.cache.state import CacheState, PlannedState, Signal
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.discover import rows_in
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.lora_scales import scales_kept, scales_kept_by
from vllm_omni.diffusion.denoiser.rows import latents_of, row_slices
from vllm_omni.diffusion.denoiser.specs import denoisers_of
from vllm_omni.diffusion.denoiser.step_tracker import StepTracker
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker.adapters import AdapterSwitch
from vllm_omni.diffusion.worker.batching import CallBinder
from vllm_omni.diffusion.worker.components import Components, component_key
from vllm_omni.diffusion.worker.coroutine import (
    TEXT_ENCODERS,
    Awaited,
    ComponentCall,
    DenoiserCall,
    Event,
    Failed,
    Finished,
    PipelineTask,
    device_of,
)
from vllm_omni.diffusion.worker.memory import Retries, work_of
from vllm_omni.diffusion.worker.pace import settle, size_of, usual
from vllm_omni.diffusion.worker.preview import can_preview, draw
from vllm_omni.diffusion.worker.request import ParkedCall, PlanOf, Previews, Request
from vllm_omni.diffusion.worker.shared_modules import NOTHING_CHANGED, OwnChanges, SharedModules
from vllm_omni.distributed.peers import Peers
from vllm_omni.errors import InvalidValueError
from vllm_omni.guidance import Readers
from vllm_omni.inputs.prompt_cache import PromptCache
from vllm_omni.kernels.device import DeviceClock, Memory, Span, let_go, moved, tried
from vllm_omni.kernels.placement import take_turns
from vllm_omni.kernels.room import Room
from vllm_omni.kernels.timing import Pace
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


class ModelRunner:
    """Runs parked calls on the pipeline's denoisers, text encoders and decoder."""

    def __init__(self, pipeline: Any, config: OmniDiffusionConfig) -> None:
        self.pipeline, self.prompts = pipeline, PromptCache(int(config.prompt_cache_mb * 2**20))
        self.joins = config.join_guidance  # the branches of a step are made in one forward
        self.peers: Peers | None = None  # other ranks that make the same forwards
        self._readers = Readers(type(pipeline).__name__)
        self.device = device_of(pipeline, bool(config.component_devices))
        self.modules: dict[str, torch.nn.Module] = denoisers_of(pipeline)
        self.denoisers = {name: Denoiser(module) for name, module in self.modules.items()}
        self.binders = {name: CallBinder(name, denoiser) for name, denoiser in self.denoisers.items()}
        own = type(pipeline).__module__.startswith("diffusers.pipelines.")  # what those hook, a guider does
        hooked = not own or any(isinstance(part, BaseGuidance) for part in vars(pipeline).values())
        self._shared = SharedModules(self.modules.values, self._other_parts, hooked)
        self.pace, self.clock, self.memory = Pace(), DeviceClock(self.device), Memory(self.device)
        loaded = self.memory.begin()
        free = self.memory.free(config.gpu_memory_utilization) if config.parallel_config.ranks == 1 else None
        self.room = Room(free, config.max_num_seqs, loaded)  # ranks must not decide by what each has measured
        self.retries = Retries(self.memory, self.room, by_clock=config.parallel_config.ranks == 1)
        self.forwards = {"computed": 0, "skipped": 0}
        self.adapters = AdapterSwitch(pipeline, config.lora_modules)
        self.components = Components(pipeline, config.component_devices, self.device, self)

    def start(
        self,
        asked: OmniDiffusionRequest,
        arguments: dict[str, Any],
        backend: StackBackend | None,
        settings: CacheSettings | None,
        plan_of: PlanOf | None = None,
    ) -> Request:
        """Begin a request, and park it at its first call: of a text encoder, or of its denoiser."""
        began = self.clock.mark()
        self._check_denoisers()
        self._shared.scan()
        take_turns(self.pipeline, self.modules.values())  # hooks are new after an adapter was loaded
        arguments = {name: moved(value, self.device) for name, value in arguments.items()}
        task = PipelineTask(self.pipeline, arguments, self.device, elsewhere=self.components.elsewhere)
        if (boundary := asked.params.boundary_ratio) is not None:
            task.pipeline.register_to_config(boundary_ratio=boundary)  # of the request's own copy
        adapters = asked.params.lora_request or ()
        if plan_of is None and (encode := getattr(type(self.pipeline), "encode_prompt", None)) is not None:

            def encode_prompt(*args: Any, **given: Any) -> Any:
                return self.prompts.encode((asked.salt, adapters), partial(encode, task.pipeline), args, given)

            vars(task.pipeline).setdefault("encode_prompt", encode_prompt)
        previews = Previews(asked.params.preview_every if can_preview(self.pipeline) else None)
        request = Request(
            asked.request_id, task, backend, settings, StepTracker(task.pipeline), adapters, plan_of, previews=previews
        )
        request.own_boundary = boundary is not None
        self.adapters.use(adapters)  # text encoders can have adapters too
        self.retries.running.add(request)
        self._ran_component(request, self._advance(request), (began, self.clock.mark()))
        return request

    def _other_parts(self) -> list[torch.nn.Module]:
        parts = {name: part for name, part in vars(self.pipeline).items() if name not in self.modules}
        return [part for part in parts.values() if isinstance(part, torch.nn.Module)]

    def _check_denoisers(self) -> None:
        now = denoisers_of(self.pipeline)
        for name, module in self.modules.items():
            if now.get(name) is not module:
                raise InvalidValueError(name, type(now.get(name)).__name__, "was replaced; make a new engine for it")
            refuse_other_caches(module)

    def run(self, batch: Sequence[Request]) -> None:
        """One forward for calls that fit together, then each request goes on to its next call or its end."""
        if isinstance(batch[0].call, ComponentCall):
            self.components.run(batch)
        elif (signal := _parked(batch[0]).signal) is not None:
            self._look(batch, signal)
        else:
            self._run_denoiser(batch)

    def abort(self, request: Request, error: Exception) -> None:
        """End a parked request with `error`."""
        self._arrive(request, self._advance(request, error))

    # ------------------------------------------------------------------------------------------ three kinds of call

    def _run_denoiser(self, batch: Sequence[Request]) -> None:
        skips, alone = _parked(batch[0]).kind is StepKind.SKIP, len(batch) == 1
        began = self.clock.mark()
        work = work_of(batch[0])
        results = self.retries.each_or_errors(batch, self._forward)
        count = len(results)
        done = self.clock.mark()
        self.clock.later(done, lambda: self.room.lasted(work, count, self.clock.seconds(began, done)))
        for request, result in zip(batch, results, strict=False):
            step, resumed = request.step, self.clock.mark()
            event = self._advance(request, result) if isinstance(result, Exception) else self._deliver(request, result)
            own, forward = (resumed, self.clock.mark()), (began, done)
            goes_on = event is None or isinstance(event, DenoiserCall | Awaited)
            if request.plan_of is None:
                self.pace.step_done(self.clock, request.size, request.times, step, forward, own, goes_on, alone, skips)
            if event is None:
                self._next(request)
            elif goes_on:
                self._arrive(request, event)
            else:
                self._ran_component(request, event, own)
            if request.previews.due is not None:
                with self._shared.lent_to(OwnChanges()), scales_kept(self.components.encoders):
                    draw(request, self.pipeline, self.binders, self.components.elsewhere)

    def _deliver(self, request: Request, results: Sequence[Any]) -> Event | None:
        """Bring the request what its calls have returned; None if others must be made before it can go on."""
        last = request.made(results)
        return None if request.queue else self._advance(request, last)

    def _look(self, batch: Sequence[Request], signal: Signal) -> None:
        """Let the gates of parked calls see them; each waits again, for a full forward or for one without blocks."""
        results = self.retries.each_or_errors(batch, partial(self._show, signal))
        for request, result in zip(batch, results, strict=False):
            if isinstance(result, Exception):
                self._arrive(request, self._advance(request, result))
            else:
                request.looked()
                self._next(request)

    # --------------------------------------------------------------------------------------------- what can be retried

    def _forward(self, batch: Sequence[Request]) -> list[Any]:
        rows, calls = self._rows(batch), [call for request in batch for call in _parked(request).here]
        forecasts = [call.forecast for call in calls]
        needless = all(map(is_of_output, forecasts))
        first, arguments = (calls[0], {}) if needless else self._joined(batch)
        forward = CachedForward(None if needless else self._stack(batch, first, arguments), rows, forecasts)
        with (NOTHING_CHANGED if needless else first.changes).installed(), forward:
            output = None if needless else self._call(first.branch[0], arguments)
            split = partial(forward.results, output)
            each = iter(split() if self.peers is None else self.peers.guarded(split))
            results = [[next(each) for _ in _parked(request).here] for request in batch]
            if self.peers is not None:
                results = self.peers.completed(results, [_parked(request).mine is not None for request in batch])
            forward.commit(output)
        if batch[0].plan_of is None:
            self.forwards["skipped" if forward.skips else "computed"] += 1
        for request, made in zip(batch, results, strict=True):
            for call, result in _parked(request).elsewhere(made):
                _rows_of(request, call, slice(None)).made_elsewhere(result, forward.skips)
        return results

    def _show(self, signal: Signal, batch: Sequence[Request]) -> list[None]:
        rows, agree = self._rows(batch), list if self.peers is None else self.peers.agree
        if signal is Signal.LATENTS:
            look(rows, signal, None, None, agree)
            return [None] * len(batch)
        call, arguments = self._joined(batch)
        if (stack := self._stack(batch, call, arguments)) is not None:  # else it gave up its cache for lack of room
            with call.changes.installed():
                look(rows, signal, stack, partial(self._call, call.branch[0], arguments), agree)
        return [None] * len(batch)

    def _rows(self, batch: Sequence[Request]) -> list[BatchRows]:
        """What is whose in a joint call."""
        calls = [(request, call) for request in batch for call in _parked(request).here]
        rows = row_slices([call.rows for _, call in calls])
        return [_rows_of(request, call, own) for (request, call), own in zip(calls, rows, strict=True)]

    def _joined(self, batch: Sequence[Request]) -> tuple[ParkedCall, dict[str, Any]]:
        """The first of a batch's calls, and the arguments of all of them as one; its adapters are on."""
        calls = [call for request in batch for call in _parked(request).here]
        if calls[0].changes:
            self.components.quiet()
        self.adapters.use(batch[0].adapters)  # before its blocks are exchanged: switching must reach all of them
        return calls[0], self.binders[calls[0].branch[0]].join([call.arguments for call in calls])

    def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        module = self.modules[name]
        with scales_kept_by(module, arguments):
            return module(**arguments) if self.peers is None else self.peers.call(module, arguments)

    # --------------------------------------------------------------------------------------------------- between calls

    def _advance(self, request: Request, result: Any = None) -> Event:
        """Let the request go on with what its call returned, or raised."""
        if request.changes:  # which its pipeline finds on modules that others use elsewhere
            self.components.quiet()
        with self._shared.lent_to(request.changes), scales_kept(self.components.encoders):
            event = request.task.throw(result) if isinstance(result, Exception) else request.task.resume(result)
        let_go(event.error if isinstance(event, Failed) else None)
        return event

    def go_on(self, request: Request, result: Any, joint: Span | float, sharing: int) -> None:
        """Bring a request what its component's call has returned, or raised; `sharing` requests shared the call."""
        resumed = self.clock.mark()
        event = self._advance(request, result)
        self._ran_component(request, event, (resumed, self.clock.mark()), joint, sharing)

    def _ran_component(
        self, request: Request, event: Event, own: Span, joint: Span | float | None = None, n: int = 1
    ) -> None:
        """Take in work before the first or after the last denoiser call: its own, and that of a call that `n` share.

        `joint` is in seconds if it was made elsewhere.
        """
        encoding, ends = request.schedule is None, isinstance(event, Finished)
        if request.plan_of is None:
            self.pace.coding_done(self.clock, request.size, request.times, own, joint, n, encoding, ends)
        self._arrive(request, event)

    def _arrive(self, request: Request, event: Event) -> None:
        """Take in what the request brings: its end, or a call whose kind and batch key are decided now."""
        if isinstance(event, Finished | Failed):
            request.end(event)
        elif isinstance(event, ComponentCall):  # nothing of the last denoiser call is held: a decode needs the room
            key = request.request_id if request.changes else component_key(event) or request.request_id
            own = request.adapters if event.component in TEXT_ENCODERS else ()
            request.parked = ParkedCall(event, (key, own), StepKind.COMPONENT)
        else:
            _, error = tried(partial(self._take, request, event))
            if error is not None:  # the request's own arguments or schedule: it alone ends
                request.end(self._advance(request, error))

    def _take(self, request: Request, event: DenoiserCall | Awaited) -> None:
        """Queue a call of a request; if its pipeline can go on without the result, it waits for the next call."""
        if isinstance(event, Awaited):
            request.calls.asked()
            if self.peers is not None and self.peers.share is not None:
                request.undivide()
        else:
            call = self._park(request, event)
            if (form := self._form(request, call)) is not None:
                promise = request.task.promise(form)
                request.queue.append(call._replace(promise=promise))
                self._arrive(request, self._advance(request, promise.value))
                return
            request.queue.append(call)
        self._next(request)

    def _form(self, request: Request, call: ParkedCall) -> Any:
        """The form of the call's result, if its pipeline may have a promise of it; else None."""
        given = request.task.given
        request.calls.over |= bool(request.changes) or not self.joins or given in self._readers
        alone = isinstance(call.key, tuple) and call.key[0] == (call.branch[0], request.request_id)
        form = request.calls.comes(call.place, call.branch, None if alone else call.key, call.arguments)
        if request.calls.looked_at == call.place:
            self._readers.add(given)
        return form

    def _next(self, request: Request) -> None:
        """Park the request at its next calls."""
        share = None if self.peers is None else self.peers.share
        request.park(partial(self._signal, request), partial(self._decided, request), share)

    def _park(self, request: Request, call: DenoiserCall) -> ParkedCall:
        binder = self.binders[call.denoiser]
        arguments = binder.bind(call.args, call.kwargs)
        position = request.tracker.locate(call.denoiser, call.branch)
        if request.position is None or position.run != request.position.run:
            self._begin_schedule(request, call.denoiser, arguments)
        request.position = position
        rows = self._learn(request, call, arguments)
        changes = request.changes if request.changes else NOTHING_CHANGED  # and not what comes before its forward
        key = self._batch_key(request, call.denoiser, arguments)
        parked = ParkedCall(call, key, StepKind.COMPUTE, arguments, rows, position, changes=changes)
        if self._stack([request], parked, arguments) is None:
            return parked
        request.cache.follow(parked.branch, latents_of(arguments))
        return parked._replace(cached=True)

    def _signal(self, request: Request, call: ParkedCall) -> Signal | None:
        """What a gate must still see of the call before its step is decided."""
        if call.seen or not _cached(request, call):
            return None
        return request.cache.signal(call.branch, call.step)

    def _decided(self, request: Request, call: ParkedCall) -> ParkedCall:
        """The call as it waits for its forward: with a forecast, or to be computed."""
        own = request.cache if _cached(request, call) else None
        forecast = None if own is None else own.forecast(call.branch, call.step, call.rows)
        kind = StepKind.COMPUTE if forecast is None else StepKind.SKIP
        unchanged = kind is call.kind and forecast is call.forecast
        return call if unchanged else call._replace(kind=kind, forecast=forecast)

    def _stack(self, batch: Sequence[Request], call: ParkedCall, arguments: Mapping[str, Any]) -> BlockStack | None:
        """What calls like `call` may be cached with; nothing was proven of a denoiser as a pipeline has changed it."""
        name = call.branch[0]
        if self.denoisers[name].written is None and call.changes:
            return None
        backends = dict.fromkeys(request.backend for request in batch if request.backend is not None)
        return next((stack for one in backends if (stack := one.stack_for(name, arguments)) is not None), None)

    def _learn(self, request: Request, call: DenoiserCall, arguments: dict[str, Any]) -> int:
        """Have the denoiser examined if it gets a call of a new kind; returns the rows of the call."""
        denoiser, module = self.denoisers[call.denoiser], self.modules[call.denoiser]
        if not denoiser.knows(arguments) and not request.changes:
            self.adapters.use(request.adapters)
            with scales_kept_by(module, arguments):
                denoiser.learn(arguments, lambda given: module(**given))
        return rows_in(arguments) or 1

    def _batch_key(self, request: Request, denoiser: str, arguments: dict[str, Any]) -> Hashable:
        binder = self.binders[denoiser]
        if request.changes:
            return binder.name, request.request_id
        own = None if request.backend is None else request.backend.denoisers.get(binder.name)
        other_stack = id(own) if own is not None and own is not self.denoisers[binder.name] else None
        key = binder.key(arguments, request.request_id, request.shared_content)
        return key, request.adapters, other_stack

    def _begin_schedule(self, request: Request, denoiser: str, arguments: dict[str, Any]) -> None:
        """Plan the cache for the schedule that the pipeline has just set up."""
        schedule = request.tracker.schedule()
        request.begin(schedule)
        request.size = size_of(denoiser, arguments, request.task.arguments, request.task.pipeline)
        if request.plan_of is not None and request.backend is not None:
            made = request.plan_of(schedule) or CacheState()
            request.cache = made if isinstance(made, CacheState) else PlannedState(made, request.backend.store, {})
        elif request.backend is not None and request.settings is not None:
            settings, own = request.settings, request.settings.plan == request.backend.settings.plan
            if not request.backend.waits(settings, schedule):
                settings = settle(self.pace, settings, request.size, schedule, own)
            state = request.backend.refresh(
                request.task.pipeline, schedule.steps, request_id=request.request_id, settings=settings
            )
            assert state is not None
            request.cache = request.backend.noticed(state, schedule, settings, usual(request))


def _parked(request: Request) -> ParkedCall:
    assert request.parked is not None
    return request.parked


def _cached(request: Request, call: ParkedCall) -> bool:
    return call.cached and request.backend is not None


def _rows_of(request: Request, call: ParkedCall, rows: slice) -> BatchRows:
    return BatchRows(request.cache, call.branch, call.step, rows, call.arguments)
