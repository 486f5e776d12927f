"""Which step a denoiser call belongs to, and of which schedule. Reads schedulers; decides nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from vllm_omni.diffusion.cache.segments import Switches

DEFAULT_BRANCH = "default"


class Moment(NamedTuple):
    """A denoiser call's place: `run` counts schedules, `step` within one, `branch` names the guidance branch."""

    run: int
    step: int
    branch: str


class Schedule(NamedTuple):
    """What a run will do: how many steps, the noise level of each, and where another denoiser takes over."""

    steps: int
    sigmas: tuple[float, ...]
    switches: Switches = ()


class Clock(Protocol):
    def locate(self, denoiser: str, branch: str | None) -> Moment: ...
    def schedule(self) -> Schedule:
        """The schedule that is running."""

    def stop(self) -> None: ...


class SchedulerClock:
    """Follows one scheduler: `set_timesteps` begins a run, `step` ends a step. Unnamed calls count within the step."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._scheduler: Any = None
        self._run = self._step = 0
        self._unnamed: dict[str, int] = {}
        self.observe: Callable[[Any, Any], None] | None = None  # gets each step's model output and sample
        self.attach()

    def attach(self) -> None:
        """Watch the pipeline's scheduler, if it is not the one watched already."""
        scheduler = self._pipeline.scheduler
        if scheduler is self._scheduler:
            return
        self.stop()
        self._scheduler = scheduler
        self._next_run()
        vars(scheduler)["set_timesteps"] = _before(scheduler.set_timesteps, self._next_run)
        vars(scheduler)["step"] = _after(scheduler.step, self._stepped)

    def stop(self) -> None:
        if self._scheduler is not None:
            vars(self._scheduler).pop("set_timesteps", None)
            vars(self._scheduler).pop("step", None)
            self._scheduler = None

    def _next_run(self) -> None:
        self._run += 1
        self._step = 0
        self._unnamed.clear()

    def _stepped(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> None:
        if self.observe is not None:
            self.observe(model_output, sample)
        self._step += 1
        self._unnamed.clear()

    def locate(self, denoiser: str, branch: str | None) -> Moment:
        self.attach()
        if branch is None:
            ordinal = self._unnamed.get(denoiser, 0)
            self._unnamed[denoiser] = ordinal + 1
            branch = DEFAULT_BRANCH if ordinal == 0 else f"{DEFAULT_BRANCH}-{ordinal}"
        return Moment(self._run, self._step, branch)

    def schedule(self) -> Schedule:
        return schedule_of(self._pipeline)


class CallClock:
    """For a bare denoiser without a scheduler: a branch seen again is a new step, `steps` of them a run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._calls = 0
        self._seen: set[tuple[str, str]] = set()

    def locate(self, denoiser: str, branch: str | None) -> Moment:
        key = (denoiser, branch or DEFAULT_BRANCH)
        if key in self._seen:
            self._calls += 1
            self._seen.clear()
        self._seen.add(key)
        return Moment(self._calls // self.steps, self._calls % self.steps, key[1])

    def schedule(self) -> Schedule:
        return Schedule(self.steps, tuple(1 - i / self.steps for i in range(self.steps)))

    def stop(self) -> None:
        self._calls = 0
        self._seen.clear()


def schedule_of(pipeline: Any) -> Schedule:
    """The schedule a pipeline is about to run: what it really runs, not what was asked for.

    One device read, once per request. Schedulers without sigmas give their timesteps as a fraction instead.
    """
    scheduler = pipeline.scheduler
    timesteps = scheduler.timesteps
    steps = vars(pipeline).get("_num_timesteps") or len(timesteps)
    switches = _switches(pipeline, timesteps[-steps:])
    sigmas = vars(scheduler).get("sigmas")
    if sigmas is not None and len(sigmas) > steps:
        return Schedule(steps, tuple(float(s) for s in sigmas.tolist()[-steps - 1 : -1]), switches)
    span = float(scheduler.config.num_train_timesteps)
    return Schedule(steps, tuple(float(t) / span for t in timesteps.tolist()[-steps:]), switches)


def _switches(pipeline: Any, timesteps: torch.Tensor) -> Switches:
    """Wan 2.2's experts: the first is for timesteps from `boundary_ratio` of the training's on, the second for those
    below; the comparison is the pipeline's own."""
    boundary = vars(pipeline).get("_internal_dict", {}).get("boundary_ratio")
    if boundary is None:
        return ()
    noisy = (timesteps >= boundary * pipeline.scheduler.config.num_train_timesteps).tolist()
    return tuple(step for step in range(1, len(noisy)) if noisy[step] != noisy[step - 1])


def _before(method: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return method(*args, **kwargs)

    return noted


def _after(method: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        note(*args, **kwargs)
        return result

    return noted
