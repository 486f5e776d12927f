"""Where models, caches and batches meet: runs one scheduled batch of parked calls, and brings each request its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from vllm_omni.diffusion.denoiser.step_tracker import StepTracker
from vllm_omni.diffusion.cache.forward import Member, Record, correction, note_computed, note_skipped, probe
from vllm_omni.diffusion.cache.gates.gate import GateCache, Signal, Looked, decide
from vllm_omni.diffusion.cache.state import Forecast
from vllm_omni.diffusion.cache.base import StackBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.specs import DENOISER_NAMES, DENOISERS
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.hooks.conditioning import Memory
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker import parts
from vllm_omni.diffusion.worker.adapters import AdapterSwitch
from vllm_omni.diffusion.worker.batching import CallBinder, row_slices, take_rows
from vllm_omni.diffusion.worker.coroutine import DenoiserCall, Event, Failed, Finished, ComponentCall, PipelineTask
from vllm_omni.diffusion.worker.pace import Pace, Stopwatch, size_of
from vllm_omni.diffusion.worker.preview import can_preview, preview
from vllm_omni.inputs.lora import Adapters
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


@dataclass
class RequestState:
    """A running request, owned by the runner: its coroutine, its cache, and the call it is parked at."""

    request_id: str
    task: PipelineTask
    backend: StackBackend | None
    config: DiffusionCacheConfig | None
    clock: StepTracker
    started: float = field(default_factory=time.perf_counter)
    denoising: float = 0.0  # seconds until its last denoiser call ended
    encoding: float = 0.0  # seconds of work until the first denoiser call; of what was shared, its share
    decoding: float = 0.0  # and from the last denoiser call's result to the end
    run: int = -1
    step: int = 0
    steps: int | None = None
    sigmas: tuple[float, ...] = ()
    preview_every: int | None = None
    adapters: Adapters = ()
    observed: tuple[int, Any, Any] | None = None  # step, model output and sample that a preview is due of
    preview: list[Any] | None = None  # images of the latest preview, until somebody takes them
    computed: set[int] = field(default_factory=set)
    cache: Record | None = None
    event: Event | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    member: Member | None = None
    forecast: Forecast | None = None
    undecided: bool = False  # its gate must look at the call first
    key: Hashable = None
    memory: dict[int, Any] = field(default_factory=dict)
    embedded: dict[str, Memory] = field(default_factory=dict)  # by denoiser
    size: Hashable = None  # what `pace` knows it by
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def skips(self) -> bool:
        return self.undecided or self.forecast is not None

    @property
    def turn(self) -> StepKind:
        if isinstance(self.event, ComponentCall):
            return StepKind.COMPONENT
        return StepKind.SKIP if self.skips else StepKind.COMPUTE

    @property
    def plan(self) -> tuple[bool, ...] | None:
        plan = self.cache.plan if self.cache is not None else None
        return plan.compute if plan is not None else None

    def observe(self, model_output: Any, sample: Any) -> None:
        """The guided model output and the sample of a step that ends, kept where a preview of it is due."""
        if self.preview_every and (self.step + 1) % self.preview_every == 0:
            self.observed = self.step, model_output, sample

    def take_preview(self) -> list[Any]:
        images, self.preview = self.preview or [], None
        return images

    def release(self) -> None:
        """Give back every byte the request holds."""
        if self.cache is not None:
            self.cache.drop()
        self.clock.stop()
        self.arguments, self.member, self.forecast = {}, None, None
        self.task.pipeline = None  # the pipeline's copy holds a proxy that holds the task
        self.memory.clear()
        self.embedded.clear()


class ModelRunner:
    """Runs parked calls on the pipeline's denoisers."""

    def __init__(self, pipeline: Any, lora_modules: dict[str, str] | None = None) -> None:
        self.pipeline = pipeline
        self._device = pipeline._execution_device if isinstance(pipeline, DiffusionPipeline) else None
        self.modules = {n: m for n in DENOISER_NAMES if isinstance(m := vars(pipeline).get(n), torch.nn.Module)}
        self.binders = {n: CallBinder(n, m, DENOISERS.get(_class_name(m))) for n, m in self.modules.items()}
        self.pace = Pace()
        self.forwards = {"computed": 0, "skipped": 0}
        self.adapters = AdapterSwitch(pipeline, lora_modules or {})
        for name in sorted({_class_name(self.modules[n]) for n, b in self.binders.items() if b.spec is None}):
            logger.warning("%s is not described: its requests run one per forward, uncached", name)

    def start(
        self,
        request_id: str,
        arguments: dict[str, Any],
        backend: StackBackend | None,
        config: DiffusionCacheConfig | None,
        preview_every: int | None = None,
        adapters: Adapters = (),
        boundary_ratio: float | None = None,
    ) -> RequestState:
        """Begin a request, and park it at its first call: of a text encoder, or of its denoiser.

        `boundary_ratio` is where a second denoiser takes over, where it is not the pipeline's own.
        """
        task = PipelineTask(self.pipeline, arguments, self._device)
        if boundary_ratio is not None:
            task.pipeline.register_to_config(boundary_ratio=boundary_ratio)  # of the request's own copy
        state = RequestState(request_id, task, backend, config, StepTracker(task.pipeline), adapters=adapters)
        self.adapters.use(adapters)  # text encoders can have adapters too
        if preview_every is not None and can_preview(self.pipeline):
            state.preview_every, state.clock.observe = preview_every, state.observe
        event = task.resume()
        self._ran_part(state, event, time.perf_counter() - state.started, alone=True)
        return state

    def run(self, states: Sequence[RequestState]) -> None:
        """One forward for calls that fit together, then each request goes on to its next call or its end."""
        if isinstance(states[0].event, ComponentCall):
            self._run_parts(states)
            return
        if states[0].undecided:
            self._decide(states)
            return
        timed = len(states) == 1 and self.pace.times(states[0].size, states[0].skips)
        began = time.perf_counter()
        results = self._each_or_errors(states, self._forward)
        if timed:
            self.pace.wait()
        now = time.perf_counter()
        for state, result in zip(states, results, strict=True):
            state.denoising = now - state.started
            failed = isinstance(result, Exception)
            step, skipped, resumed = state.step, state.skips, time.perf_counter()
            event = state.task.throw(result) if failed else state.task.resume(result)
            goes_on = isinstance(event, DenoiserCall)
            took = time.perf_counter() - resumed
            self.pace.note(state.size, state.watch, step, now - began + (took if goes_on else 0.0), timed, skipped)
            if goes_on:
                self._arrive(state, event)
            else:
                self._ran_part(state, event, took, alone=True)
            if state.observed is not None:
                self._preview(state, *state.observed)

    def _run_parts(self, states: Sequence[RequestState]) -> None:
        """Text encoders or decoders: as few calls as their size allows, then each request goes on."""
        for chunk in parts.chunks([_part_call(state) for state in states]):
            sharing = states[chunk]
            began = time.perf_counter()
            results = self._each_or_errors(sharing, self._call_part)
            share = (time.perf_counter() - began) / len(sharing)
            for state, result in zip(sharing, results, strict=True):
                resumed = time.perf_counter()
                failed = isinstance(result, Exception)
                event = state.task.throw(result) if failed else state.task.resume(result)
                self._ran_part(state, event, share + time.perf_counter() - resumed, alone=len(sharing) == 1)

    def _ran_part(self, state: RequestState, event: Event, seconds: float, alone: bool) -> None:
        """What was done before the first or after the last denoiser call has taken `seconds` more."""
        state.watch.ends += seconds
        state.watch.ends_alone = state.watch.ends_alone and alone
        if state.run < 0:
            state.encoding += seconds
        else:
            state.decoding += seconds
        if isinstance(event, Finished) and state.run >= 0:
            self.pace.finish(state.size, state.watch)
        self._arrive(state, event)

    def _call_part(self, states: Sequence[RequestState]) -> list[Any]:
        calls = [_part_call(state) for state in states]
        return parts.run(vars(self.pipeline)[calls[0].part], calls)

    def abort(self, state: RequestState, error: Exception) -> None:
        """End a parked request with `error`."""
        self._arrive(state, state.task.throw(error))

    def _preview(self, state: RequestState, step: int, velocity: torch.Tensor, latents: torch.Tensor) -> None:
        state.observed = None
        if isinstance(state.event, DenoiserCall):  # at the end, the picture itself comes
            state.preview = preview(self.pipeline, state.task.arguments, latents, velocity, state.sigmas[step])

    def _arrive(self, state: RequestState, event: Event) -> None:
        """Signal at what the request brings: an end, or a call whose kind of step and batch key are decided now."""
        state.event = event
        if isinstance(event, Finished | Failed):
            state.release()
            return
        if isinstance(event, ComponentCall):
            state.arguments, state.member, state.forecast = {}, None, None  # a decode needs the room
            state.rows, state.key = 0, parts.key(event) or state.request_id
            return
        try:
            self._prepare(state, event)
        except Exception as error:  # the request's own arguments or schedule: it alone ends
            state.event = state.task.throw(error)
            state.release()

    def _prepare(self, state: RequestState, call: DenoiserCall) -> None:
        binder = self.binders[call.denoiser]
        state.arguments = binder.bind(call.args, call.kwargs)
        state.rows = binder.rows(state.arguments)
        moment = state.clock.locate(call.denoiser, call.branch)
        if moment.run != state.run:
            self._begin_schedule(state, call.denoiser, moment.run)
        state.step = moment.step
        state.member, state.forecast, state.undecided = None, None, False
        if state.cache is not None and state.backend is not None and call.denoiser in state.backend.stacks:
            key = (call.denoiser, moment.branch)
            state.member = Member(state.cache, key, moment.step, slice(0, state.rows))
            state.undecided = (
                isinstance(state.cache, GateCache)
                and not binder.adds_between_blocks(state.arguments)
                and state.cache.wants_look(key, moment.step)
            )
            if isinstance(state.cache, GateCache) and state.undecided:
                latents = state.cache.gate.look is Signal.LATENTS  # read alone: calls need not fit together
                state.key = (state.cache.gate.look, None if latents else self._batch_key(state, binder))
                return
        self._decided(state)

    def _decided(self, state: RequestState) -> None:
        """The call's kind of step is known: it parks for the forward."""
        state.undecided = False
        call = state.event
        assert isinstance(call, DenoiserCall)
        binder = self.binders[call.denoiser]
        if (member := state.member) is not None and not binder.adds_between_blocks(state.arguments):
            state.forecast = member.cache.forecast(member.key, member.step, state.rows)
        if state.forecast is None:
            state.computed.add(state.step)
        state.key = self._batch_key(state, binder)

    def _batch_key(self, state: RequestState, binder: CallBinder) -> Hashable:
        return binder.key(state.arguments, state.request_id, state.memory), state.adapters

    def _begin_schedule(self, state: RequestState, denoiser: str, run: int) -> None:
        state.run = run
        state.steps, state.sigmas, switches = state.clock.schedule()
        if state.cache is not None:
            state.cache.drop()
        state.size = size_of(denoiser, state.arguments, state.task.arguments)
        if state.backend is not None:
            config = state.config
            if config is not None:
                config = self.pace.settle(config, state.size, state.steps, switches)
            state.cache = state.backend.refresh(
                state.task.pipeline, state.steps, verbose=False, request_id=state.request_id, config=config
            )

    def _decide(self, states: Sequence[RequestState]) -> None:
        """Let the gates of parked calls look; each then waits again, for a full forward or for one without blocks."""
        for state, result in zip(states, self._each_or_errors(states, self._look), strict=True):
            if isinstance(result, Exception):
                self._arrive(state, state.task.throw(result))
            else:
                self._decided(state)

    def _look(self, states: Sequence[RequestState]) -> list[None]:
        """Show each request's gate its rows, and take the decisions: one device read for all of them."""
        first = states[0].member
        assert first is not None and isinstance(first.cache, GateCache)
        gate, seen = first.cache.gate, None
        rows = row_slices([state.rows for state in states])
        if gate.look is not Signal.LATENTS:
            module, binder = self.modules[first.key[0]], self.binders[first.key[0]]
            stack = self._stack(states, first.key[0])
            assert stack is not None
            self.adapters.use(states[0].adapters)
            seen = probe(gate, stack, partial(module, **binder.join([state.arguments for state in states])))
        looked: list[Looked] = []
        for state, own in zip(states, rows, strict=True):
            assert state.member is not None
            cache = state.member.cache
            assert isinstance(cache, GateCache)
            if seen is None:
                now = cache.gate.describe(state.arguments["hidden_states"], state.arguments, cache.sigma(state.step))
            else:
                now = seen[own].clone() if len(states) > 1 else seen
            looked.append((cache, state.member.key, state.step, now))
        decide(looked)
        return [None] * len(states)

    def _each_or_errors(
        self, states: Sequence[RequestState], act: Callable[[Sequence[RequestState]], list[Any]]
    ) -> list[Any]:
        """Each request's result, or the exception its own call raises: a joint failure is looked for one by one."""
        try:
            return act(states)
        except Exception as error:  # out of memory or a bad input of one must not end the others
            if len(states) == 1:
                return [error]
        return [self._each_or_errors([state], act)[0] for state in states]

    def _forward(self, states: Sequence[RequestState]) -> list[Any]:
        call = states[0].event
        assert isinstance(call, DenoiserCall)
        module, binder = self.modules[call.denoiser], self.binders[call.denoiser]
        rows = row_slices([state.rows for state in states])
        arguments = binder.join([state.arguments for state in states])
        members = [
            Member(s.member.cache, s.member.key, s.member.step, r)
            for s, r in zip(states, rows, strict=True)
            if s.member is not None
        ]
        stack, latents = self._stack(states, call.denoiser), arguments.get("hidden_states")
        self.adapters.use(states[0].adapters)
        if states[0].skips:
            assert stack is not None
            forecasts = [(r, s.forecast) for s, r in zip(states, rows, strict=True) if s.forecast is not None]
            memory = states[0].embedded.setdefault(call.denoiser, {}) if len(states) == 1 else None
            with stack.replaced(partial(correction, forecasts), memory):
                output = module(**arguments)
            note_skipped(members)
        elif (
            stack is not None and any(member.wants for member in members) and not binder.adds_between_blocks(arguments)
        ):
            with stack.tapped():
                output = module(**arguments)
                note_computed(stack, members, latents, output)
        else:
            output = module(**arguments)
            note_computed(None, members, latents, output)
        self.forwards["skipped" if states[0].skips else "computed"] += 1
        if len(states) == 1:
            return [output]
        return [take_rows(output, r) for r in rows]

    def _stack(self, states: Sequence[RequestState], denoiser: str) -> BlockStack | None:
        return next((s.backend.stacks.get(denoiser) for s in states if s.backend is not None), None)


def _part_call(state: RequestState) -> ComponentCall:
    assert isinstance(state.event, ComponentCall)
    return state.event


def _class_name(module: torch.nn.Module) -> str:
    return type(module).__name__
