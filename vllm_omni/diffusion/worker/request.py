"""A running request: its coroutine, its cache, the call it waits at, and its times. Owned by the runner."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from vllm_omni.diffusion.cache.base import StackBackend
from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.settings import CacheSettings
from vllm_omni.diffusion.cache.state import CacheState, Forecast, Signal
from vllm_omni.diffusion.denoiser.step_tracker import StepPosition, StepTracker
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.worker.coroutine import ComponentCall, DenoiserCall, Event, Failed, Finished, PipelineTask
from vllm_omni.diffusion.worker.shared_modules import NOTHING_CHANGED, OwnChanges
from vllm_omni.guidance import StepCalls
from vllm_omni.inputs.lora import Adapters
from vllm_omni.kernels.promise import Promise
from vllm_omni.kernels.timing import Timings

PlanOf = Callable[[Schedule], CachePlan | CacheState | None]  # None: every step computes


class ParkedCall(NamedTuple):
    """The call at which a request waits, and what is decided of it. Replaced as a whole, never changed."""

    call: DenoiserCall | ComponentCall
    key: Hashable  # calls with equal keys, and of one kind, can be made as one
    kind: StepKind
    arguments: Mapping[str, Any] = {}
    rows: int = 0
    position: StepPosition | None = None
    cached: bool = False  # there is a stack to cache it with
    promise: Promise | None = None  # what the pipeline got in the place of its result
    seen: bool = False  # by a gate that wanted to
    earlier: tuple[ParkedCall, ...] = ()  # calls of the same step that are made with it
    mine: int | None = None  # which of them this rank makes, if others make the rest
    signal: Signal | None = None  # what its gate must see before the step is decided
    forecast: Forecast | None = None
    changes: OwnChanges = NOTHING_CHANGED  # of shared modules, which are installed for its forward

    @property
    def together(self) -> tuple[ParkedCall, ...]:
        """The calls that are made as one, this one last."""
        return (*self.earlier, self)

    @property
    def here(self) -> tuple[ParkedCall, ...]:
        """Those that are made on this rank."""
        return self.together if self.mine is None else (self.together[self.mine],)

    def elsewhere(self, results: Sequence[Any]) -> list[tuple[ParkedCall, Any]]:
        """Those that are not, each with its result of all the `results`."""
        every = zip(self.together, results, strict=True)
        return [one for i, one in enumerate(every) if self.mine not in (None, i)]

    @property
    def place(self) -> tuple[int, int]:
        """Run and step."""
        assert self.position is not None
        return self.position[:2]

    @property
    def step(self) -> int:
        return self.place[1]

    @property
    def branch(self) -> tuple[str, str]:
        """Denoiser and guidance branch."""
        assert isinstance(self.call, DenoiserCall) and self.position is not None
        return self.call.denoiser, self.position.branch


@dataclass
class Previews:
    """The pictures of a run that is not done: of every n-th step, as soon as they are asked for."""

    every: int | None = None
    due: tuple[int, Any, Any] | None = None  # step, model output and sample
    images: list[Any] | None = None

    def observe(self, step: int, model_output: Any, sample: Any) -> None:
        """Take in a step that ends, if a preview of it is due."""
        if self.every and (step + 1) % self.every == 0:
            self.due = step, model_output, sample.clone()  # a pipeline may write the next one into it

    def take(self) -> list[Any]:
        """The latest pictures, once."""
        images, self.images = self.images or [], None
        return images


@dataclass(eq=False)
class Request:
    """A running request. Without a cache its `cache` is a state in which every step computes."""

    request_id: str
    task: PipelineTask
    backend: StackBackend | None
    settings: CacheSettings | None
    tracker: StepTracker
    adapters: Adapters = ()
    plan_of: PlanOf | None = None  # a trial's: what its cache does, whatever the settings
    times: Timings = field(default_factory=Timings)
    previews: Previews = field(default_factory=Previews)
    cache: CacheState = field(default_factory=CacheState)
    done_before: tuple[int, int] = (0, 0)  # steps of earlier schedules: some pipelines run several for one output
    changes: OwnChanges = field(default_factory=OwnChanges)
    schedule: Schedule | None = None
    position: StepPosition | None = None  # of the last denoiser call
    parked: ParkedCall | None = None
    queue: list[ParkedCall] = field(default_factory=list)  # denoiser calls still to be made, the parked one's first
    calls: StepCalls = field(default_factory=StepCalls)
    apart: bool = False  # its calls are made one by one
    away: bool = False  # the parked call is being made elsewhere
    ended: Finished | Failed | None = None
    shared_content: dict[Any, Any] = field(default_factory=dict)  # of arguments that neighbours must share, hashed once
    size: Hashable = None  # by which `Pace` knows it
    own_boundary: bool = False  # it says itself where a second denoiser takes over

    def __post_init__(self) -> None:
        self.tracker.observe = self._observe

    def _observe(self, step: int, model_output: Any, sample: Any) -> None:
        self.previews.observe(step, model_output, sample)
        self.cache.observe(step, model_output, sample)

    @property
    def step(self) -> int:
        """The step it is at; 0 before the first."""
        return self.position.step if self.position is not None else 0

    @property
    def done(self) -> tuple[int, int]:
        """Steps computed and skipped so far."""
        return self.done_before[0] + self.cache.computed_steps, self.done_before[1] + self.cache.skipped_steps

    def begin(self, schedule: Schedule) -> None:
        """A run begins: nothing is kept of an earlier one but what it has done."""
        self.schedule, self.done_before = schedule, self.done
        self.cache.drop()
        self.cache = CacheState()

    @property
    def plan(self) -> tuple[bool, ...] | None:
        """Which steps compute, if that is known before they run."""
        return self.cache.plan.compute if self.cache.plan is not None else None

    @property
    def call(self) -> DenoiserCall | ComponentCall:
        assert self.parked is not None
        return self.parked.call

    @property
    def rows(self) -> int:
        """Of the forward that it waits for."""
        return sum(call.rows for call in self.parked.together) if self.parked is not None else 0

    def park(
        self,
        signal_of: Callable[[ParkedCall], Signal | None],
        decided: Callable[[ParkedCall], ParkedCall],
        share: tuple[int, int] | None,
    ) -> None:
        """Wait at the next call that a gate must see, or else at as many calls of a step as can be made as one.

        `share`: which of how many calls of a guided step this rank makes. It alone can say if its call skips.
        """
        calls = [call for call in self.queue if call.place == self.queue[0].place]
        for call in calls:
            if (signal := signal_of(call)) is not None:
                alike = None if signal is Signal.LATENTS else call.key
                self.parked = call._replace(key=(signal, alike), kind=StepKind.SKIP, signal=signal)
                return
        made = [*map(decided, calls)]
        mine = share[0] if share is not None and len(made) == self.calls.known == share[1] else None
        if mine is not None:
            ours = made[mine]
            made = [call._replace(kind=ours.kind, forecast=ours.forecast) for call in made]
        fitting = [*takewhile(lambda call: (call.key, call.kind) == (made[0].key, made[0].kind), made)]
        if mine is not None and len(fitting) < len(made):
            self.undivide()
            return self.park(signal_of, decided, None)
        together = made[:1] if self.apart else fitting
        last, earlier = together[-1], tuple(together[:-1])
        self.parked = last._replace(earlier=earlier, mine=mine) if earlier or mine is not None else last

    def undivide(self) -> None:
        """Make every call on every rank from now on. None has all residuals, so that all begin without."""
        self.calls.over = True
        self.cache.drop()

    def looked(self) -> None:
        """Note that a gate has seen the parked call."""
        self.queue = [call._replace(seen=True) if call.call is self.call else call for call in self.queue]

    def made(self, results: Sequence[Any]) -> Any:
        """Take in what the parked calls have returned, and keep promises; returns what was not promised."""
        assert self.parked is not None
        rest = None
        for call, result in zip(self.parked.together, results, strict=True):
            self.calls.returned(call.branch, result)
            if call.promise is None:
                rest = result
            else:
                call.promise.keep(result)
        del self.queue[: len(results)]
        return rest

    def take_apart(self) -> None:
        """Have the calls that were to be made as one made one by one."""
        self.apart = True
        if self.parked is not None and self.parked.earlier:
            first, divided = self.parked.together[0], self.parked.mine is not None
            if divided:
                self.undivide()
            self.parked = first._replace(kind=StepKind.COMPUTE, forecast=None) if divided else first

    def end(self, event: Event) -> None:
        """Give back every byte that the request holds; what it has counted stays."""
        assert isinstance(event, Finished | Failed)
        self.ended, self.parked = event, None
        self.queue.clear()
        self.calls = StepCalls()  # it may hold copies of arguments
        self.cache.drop()
        self.tracker.stop()
        self.tracker.observe = None  # no cycle keeps a tensor until a garbage collection
        self.task.release()
        self.shared_content.clear()
        self.changes.entries.clear()
