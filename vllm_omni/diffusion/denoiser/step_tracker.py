"""Which step a denoiser call belongs to, and of which schedule. Watches schedulers; decides nothing.

A scheduler is watched from outside: its class becomes a subclass that reports `set_timesteps` and `step` to whoever
watches, and whoever watches is kept beside the scheduler, not on it. So a copy, deep or shallow, a pickle or a saved
config of a watched scheduler is an ordinary scheduler.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from vllm_omni.diffusion.cache.plan.schedule import Schedule, Switches
from vllm_omni.kernels.promise import kept

DEFAULT_BRANCH = "default"


class StepPosition(NamedTuple):
    """The place of a denoiser call: `run` counts schedules, `step` within one, `branch` names the guidance branch."""

    run: int
    step: int
    branch: str


class StepTracker:
    """Follows one pipeline: its scheduler's `set_timesteps` begins a run, and `step` ends a step.

    Calls without a branch name are counted within the step.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._scheduler: Any = None
        self._run = self._step = 0
        self._index: int | None = None  # the scheduler's own after the last step
        self._unnamed: dict[str, int] = {}
        self.observe: Callable[[int, Any, Any], None] | None = None  # gets each step's model output and sample
        self.on_begin: Callable[[], None] | None = None  # called when a run begins
        self.attach()

    def attach(self) -> None:
        """Watch the pipeline's scheduler, if it is not watched already."""
        scheduler = self._pipeline.scheduler
        if scheduler is self._scheduler and self in _watchers.get(id(scheduler), ()):
            return
        self.stop()
        self._scheduler = scheduler
        watch(scheduler, self)
        self.begins()

    def stop(self) -> None:
        if self._scheduler is not None:
            unwatch(self._scheduler, self)
            self._scheduler = None

    def begins(self) -> None:
        """Note that the scheduler begins a run."""
        self._run += 1
        self._step, self._index = 0, None
        self._unnamed.clear()
        attributes = vars(self._pipeline)
        if (count := attributes.get("_num_timesteps")) is not None:
            attributes["_num_timesteps"] = _EarlierCount(count)
        if self.on_begin is not None:
            self.on_begin()

    def ended_step(self, model_output: Any, sample: Any) -> None:
        """Note that the scheduler has made a step of `sample`."""
        index = vars(self._scheduler).get("_step_index")
        again = index is not None and index == self._index  # Cosmos makes each step twice, and sets the index back
        if self.observe is not None:
            self.observe(self._step - again, model_output, sample)
        self._step += not again
        self._index = index
        self._unnamed.clear()

    def locate(self, denoiser: str, branch: str | None) -> StepPosition:
        """The position of the call that `denoiser` gets now."""
        self.attach()
        if branch is None:
            ordinal = self._unnamed.get(denoiser, 0)
            self._unnamed[denoiser] = ordinal + 1
            branch = DEFAULT_BRANCH if ordinal == 0 else f"{DEFAULT_BRANCH}-{ordinal}"
        return StepPosition(self._run, self._step, branch)

    def restart(self, steps: int | None = None) -> None:
        """Forget the calls of the step under way; the scheduler says when a run begins, and of how many steps."""
        self._unnamed.clear()

    def schedule(self) -> Schedule:
        return schedule_of(self._pipeline)


class CallTracker:
    """Follows a bare denoiser without a scheduler: a branch that comes again is a new step, `steps` of them a run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._calls = 0
        self._seen: set[tuple[str, str]] = set()

    def locate(self, denoiser: str, branch: str | None) -> StepPosition:
        key = (denoiser, branch or DEFAULT_BRANCH)
        if key in self._seen:
            self._calls += 1
            self._seen.clear()
        self._seen.add(key)
        return StepPosition(self._calls // self.steps, self._calls % self.steps, key[1])

    def schedule(self) -> Schedule:
        return Schedule(self.steps, tuple(1 - i / self.steps for i in range(self.steps)))

    def restart(self, steps: int | None = None) -> None:
        """The next call is the first of a run, of `steps` or as many as before."""
        self.steps, self._calls = steps or self.steps, 0
        self._seen.clear()

    stop = restart


Tracker = StepTracker | CallTracker


class _EarlierCount(int):
    """A pipeline's count of timesteps that an earlier run has left."""


def schedule_of(pipeline: Any) -> Schedule:
    """The schedule a pipeline is about to run: what it really runs, not what was asked for.

    One device read, once per request. A scheduler without sigmas has its timesteps taken as a fraction instead.
    """
    scheduler = pipeline.scheduler
    timesteps = scheduler.timesteps
    steps = _steps_to_run(pipeline, len(timesteps))
    places = _switches(pipeline, timesteps[-steps:]), max(0, len(timesteps) - steps)
    sigmas = getattr(scheduler, "sigmas", None)  # of a wrapper, those of the scheduler inside
    if sigmas is not None and len(sigmas) > steps:
        levels = tuple(float(s) for s in sigmas.tolist()[-steps - 1 : -1])
        inverted = getattr(getattr(scheduler, "config", None), "invert_sigmas", False)  # Mochi's rise, from 0 to 1
        return Schedule(steps, tuple(1 - s for s in levels) if inverted else levels, *places)
    span = float(scheduler.config.num_train_timesteps)
    return Schedule(steps, tuple(float(t) / span for t in timesteps.tolist()[-steps:]), *places)


def _steps_to_run(pipeline: Any, timesteps: int) -> int:
    """The count that the pipeline has taken for this run, else what is left after the scheduler's first index.

    A pipeline whose scheduler another pipeline drives has only an earlier run's count, or none.
    """
    count = vars(pipeline).get("_num_timesteps")
    if count and not isinstance(count, _EarlierCount):
        return count
    return timesteps - (getattr(pipeline.scheduler, "_begin_index", None) or 0)


def _switches(pipeline: Any, timesteps: torch.Tensor) -> Switches:
    """The steps at which Wan 2.2's experts take over from each other.

    The first is for timesteps from `boundary_ratio` of the training's on, the second for those below; the comparison
    is the pipeline's own.
    """
    boundary = vars(pipeline).get("_internal_dict", {}).get("boundary_ratio")
    if boundary is None:
        return ()
    noisy = (timesteps >= boundary * pipeline.scheduler.config.num_train_timesteps).tolist()
    return tuple(step for step in range(1, len(noisy)) if noisy[step] != noisy[step - 1])


# ------------------------------------------------------------------------------------------------- watching a scheduler

_METHODS = ("set_timesteps", "step")


# By identity: a scheduler may be equal to another one, or have no hash.
_watchers: dict[int, WeakSet[StepTracker]] = {}
_within: set[int] = set()  # schedulers in a call that is reported: what it calls in turn is part of it


def watch(scheduler: Any, tracker: StepTracker) -> None:
    """Report the scheduler's runs and steps to `tracker` until `unwatch`."""
    if id(scheduler) not in _watchers:
        _watchers[id(scheduler)] = WeakSet()
        weakref.finalize(scheduler, _watchers.pop, id(scheduler), None).atexit = False
        scheduler_class = type(scheduler)
        for name in _METHODS:  # the class's own method is out of reach, or there is none
            if name in vars(scheduler):
                vars(scheduler)[name] = _PatchedMethod(scheduler, name, vars(scheduler)[name])
            elif not hasattr(scheduler_class, name):
                vars(scheduler)[name] = _PatchedMethod(scheduler, name, getattr(scheduler, name), delegated=True)
        scheduler.__class__ = _watched_class(scheduler_class)  # type: ignore[arg-type]
    _watchers[id(scheduler)].add(tracker)


def unwatch(scheduler: Any, tracker: StepTracker) -> None:
    """Stop reporting; after the last tracker the scheduler is of its own class again."""
    watchers = _watchers.get(id(scheduler))
    if watchers is None:
        return
    watchers.discard(tracker)
    if not watchers:
        del _watchers[id(scheduler)]
        scheduler.__class__ = type(scheduler).__mro__[1]
        for name, method in list(vars(scheduler).items()):
            if isinstance(method, _PatchedMethod):
                if method.delegated:
                    del vars(scheduler)[name]
                else:
                    vars(scheduler)[name] = method.method


def _reported(scheduler: Any, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Call `method`, the scheduler's own or one in its place, and report it once, however it gets there."""
    if id(scheduler) in _within:
        return method(*args, **kwargs)
    _within.add(id(scheduler))
    try:
        if name == "set_timesteps":
            for tracker in list(_watchers.get(id(scheduler), ())):
                tracker.begins()
        result = method(*args, **kwargs)
    finally:
        _within.discard(id(scheduler))
    if name == "step":
        given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        for tracker in list(_watchers.get(id(scheduler), ())):
            tracker.ended_step(given.get("model_output"), given.get("sample"))
    return result


@functools.lru_cache(maxsize=64)
def _watched_class(scheduler_class: type) -> type:
    """A subclass of the same name that reports; whatever copies, pickles or makes an instance gets the class itself."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return scheduler_class(*args, **kwargs)

    def reporting(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(scheduler_class, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _reported(self, name, functools.partial(getattr(scheduler_class, name), self), args, kwargs)

        return method

    def setattribute(self: Any, name: str, value: Any) -> None:
        if name in _METHODS and not isinstance(value, _PatchedMethod):
            value = _PatchedMethod(self, name, value)
        scheduler_class.__setattr__(self, name, value)  # type: ignore[call-arg]

    def reduce(self: Any, protocol: Any) -> Any:
        return copyreg._reconstructor, (scheduler_class, object, None), vars(self)  # type: ignore[attr-defined]

    methods = {
        **{name: reporting(name) for name in _METHODS if hasattr(scheduler_class, name)},
        "__new__": new,
        "__setattr__": setattribute,
        "__reduce_ex__": reduce,
        "__module__": scheduler_class.__module__,
        "__qualname__": scheduler_class.__qualname__,
    }
    return _WatchedClass(scheduler_class.__name__, (scheduler_class,), methods)


class _WatchedClass(type):
    """Equal to the class it watches: Bria's pipeline compares its scheduler's type with one that it knows."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__mro__[1] is other

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


copyreg.pickle(_WatchedClass, lambda watched: (itself, (watched.__mro__[1],)))  # type: ignore[arg-type]


class _PatchedMethod:
    """A method that somebody has set on a scheduler's instance, with its calls reported.

    `delegated`: it was not set; the scheduler is a wrapper that finds the method elsewhere (`__getattr__`).
    """

    def __init__(self, scheduler: Any, name: str, method: Callable[..., Any], delegated: bool = False) -> None:
        self.scheduler, self.name, self.method, self.delegated = scheduler, name, method, delegated
        functools.update_wrapper(self, method, updated=())  # pipelines ask for the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _reported(self.scheduler, self.name, self.method, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.method, memo)

    def __reduce__(self) -> Any:
        return itself, (self.method,)


def itself(value: Any) -> Any:
    """`value`: what a pickle is made from that leaves its wrapper out."""
    return value


# ------------------------------------------------------------------------------------------------ one for each request

_lending = threading.RLock()


def own_schedulers(pipeline: Any) -> dict[str, Any]:
    """Copies for one request of all schedulers that a pipeline has: some step a second one, as LTX-2 does for sound."""
    found = {name: v for name, v in vars(pipeline).items() if isinstance(v, SchedulerMixin)}
    found["scheduler"] = pipeline.scheduler
    parts = {id(pipeline): pipeline} | {id(v): v for v in vars(pipeline).values() if isinstance(v, torch.nn.Module)}
    twins = {id(scheduler): own_scheduler(scheduler, parts) for scheduler in found.values()}
    return {name: twins[id(scheduler)] for name, scheduler in found.items()}


def own_scheduler(scheduler: Any, parts: dict[int, Any]) -> Any:
    """A copy of a pipeline's scheduler for one request, with everything that was set or patched on the instance.

    What cannot be copied, such as a lock or a file, is shared, and so are its config, which is frozen, and the
    pipeline's `parts`, by id.
    """
    methods = dir(type(scheduler))
    own = vars(scheduler).items()
    patches = {name: v for name, v in own if isinstance(v, _FUNCTIONS) or (callable(v) and name in methods)}
    frozen = [value for value in vars(scheduler).values() if isinstance(value, FrozenDict)]
    shared = parts | {id(one): one for one in (*patches.values(), *frozen)}
    for value in vars(scheduler).values():
        if not isinstance(value, torch.Tensor | int | str | FrozenDict | None):
            try:
                copy.deepcopy(value, dict(shared))
            except TypeError:
                shared[id(value)] = value
    twin = copy.deepcopy(scheduler, shared)
    for name, patch in patches.items():
        vars(twin)[name] = _LentMethod(scheduler, twin, patch.method if isinstance(patch, _PatchedMethod) else patch)
    return twin


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


class _LentMethod:
    """A function that somebody has put on a scheduler's instance, called for a request's copy of the scheduler.

    Wherever it finds the scheduler, in a closure, in a global, or by way of the pipeline, it finds the original: for
    the time of the call the original has the copy's state.
    """

    def __init__(self, original: Any, twin: Any, method: Callable[..., Any]) -> None:
        self.original, self.method = original, method
        self._twin = weakref.ref(twin)
        functools.update_wrapper(self, method, updated=())  # pipelines ask for the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        twin = self._twin()
        args, kwargs = kept((args, kwargs))  # now: others must not run while the original has the copy's state
        with _lending:
            if twin is None or vars(self.original).get(_LENT):
                return self.method(*args, **kwargs)
            _exchange(self.original, twin)
            vars(self.original)[_LENT] = True
            try:
                return self.method(*args, **kwargs)
            finally:
                del vars(self.original)[_LENT]
                _exchange(self.original, twin)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As in the plain pipeline: a copy of a bound method is bound to the copy, a function is still the same."""
        if isinstance(self.method, types.MethodType) and self.method.__self__ is self.original:
            return types.MethodType(self.method.__func__, copy.deepcopy(self._twin(), memo))
        return self


_LENT = "_vllm_omni_lent"


def _exchange(one: Any, other: Any) -> None:
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
