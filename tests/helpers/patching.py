"""The ways in which people change a scheduler that is made already. Each changes the picture."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

FACTOR = 0.9  # on what the model says
original_step: Any = None


def closure(pipe: Any) -> None:
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: own(output * FACTOR, *args, **kwargs)


def by_the_class(pipe: Any) -> None:
    scheduler = pipe.scheduler

    def step(output: Any, *args: Any, **kwargs: Any) -> Any:
        return type(scheduler).step(scheduler, output * FACTOR, *args, **kwargs)

    scheduler.step = step


def _scaled(own: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    return own(output * FACTOR, *args, **kwargs)


def partial(pipe: Any) -> None:
    pipe.scheduler.step = functools.partial(_scaled, pipe.scheduler.step)


def bound_method(pipe: Any) -> None:
    def step(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).step(self, output * FACTOR, *args, **kwargs)

    pipe.scheduler.step = types.MethodType(step, pipe.scheduler)


def default_argument(pipe: Any) -> None:
    def step(output: Any, *args: Any, _own: Any = pipe.scheduler.step, **kwargs: Any) -> Any:
        return _own(output * FACTOR, *args, **kwargs)

    pipe.scheduler.step = step


def _global_step(output: Any, *args: Any, **kwargs: Any) -> Any:
    return original_step(output * FACTOR, *args, **kwargs)


def global_variable(pipe: Any) -> None:
    """As in a script."""
    globals()["original_step"] = pipe.scheduler.step
    pipe.scheduler.step = _global_step


class _Callable:
    def __init__(self, pipe: Any) -> None:
        self.held = [pipe.scheduler.step]

    def __call__(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        return self.held[0](output * FACTOR, *args, **kwargs)


def callable_object(pipe: Any) -> None:
    pipe.scheduler.step = _Callable(pipe)


def by_the_pipeline(pipe: Any) -> None:
    def step(output: Any, *args: Any, **kwargs: Any) -> Any:
        return type(pipe.scheduler).step(pipe.scheduler, output * FACTOR, *args, **kwargs)

    pipe.scheduler.step = step


def twice(pipe: Any) -> None:
    closure(pipe)
    partial(pipe)


def written_anew(pipe: Any) -> None:
    """Euler's rule by hand: the scheduler's own step is never called."""
    scheduler = pipe.scheduler

    def step(output: Any, timestep: Any, sample: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        now, then = scheduler.sigmas[scheduler.step_index], scheduler.sigmas[scheduler.step_index + 1]
        scheduler._step_index += 1
        return (sample + (then - now) * output * FACTOR,)

    scheduler.step = step


def timesteps(pipe: Any) -> None:
    scheduler, own = pipe.scheduler, pipe.scheduler.set_timesteps

    def set_timesteps(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = 0
    ) -> None:
        own(num_inference_steps, device, sigmas=sigmas, mu=mu)
        scheduler.sigmas = scheduler.sigmas**2

    scheduler.set_timesteps = set_timesteps


PATCHES: list[Callable[[Any], None]] = [
    closure,
    by_the_class,
    partial,
    bound_method,
    default_argument,
    global_variable,
    callable_object,
    by_the_pipeline,
    twice,
    written_anew,
    timesteps,
]
