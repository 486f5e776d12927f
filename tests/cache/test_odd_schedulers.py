"""Schedulers that are not diffusers' own classes, and pipelines with more than one of them."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import diffusers as d
import pytest
import torch
from closeness import assert_close
from pipelines import CURVE, DEFAULTS, embeds, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig

STEPS = (6, 10, 4)


class Wrapper:
    """A scheduler around another one: all that it does not have itself is the other's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class SteppingWrapper(Wrapper):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.step(*args, **kwargs)


class Equal(d.FlowMatchEulerDiscreteScheduler):
    """As a dataclass is: equal to any like it, and without a hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Unsharable:
    """What a scheduler may hold and nobody can copy."""

    lock: Any = field(default_factory=threading.Lock)


def holding(value: Any) -> Callable[[Any], Any]:
    def make(scheduler: Any) -> Any:
        scheduler.kept = value
        return scheduler

    return make


ODD: dict[str, Callable[[Any], Any]] = {
    "a wrapper": Wrapper,
    "a wrapper with a step of its own": SteppingWrapper,
    "equal to others, without a hash": lambda scheduler: Equal.from_config(scheduler.config),
    "with a lock": holding(threading.Lock()),
    "with a lock inside": holding([Unsharable()]),
    "with a file": holding(io.TextIOWrapper(io.BytesIO())),
}


def odd_pipeline(change: Callable[[Any], Any]) -> Any:
    pipe = tiny_flux()
    pipe.scheduler = change(pipe.scheduler)
    return pipe


def plain(pipe: Any) -> list[torch.Tensor]:
    return [run_latents(pipe, i=i, seed=i, num_inference_steps=steps) for i, steps in enumerate(STEPS)]


def served(pipe: Any, **kwargs: Any) -> list[Any]:
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **kwargs) as omni:
        params = [Params(num_inference_steps=n, seed=i, output_type="latent") for i, n in enumerate(STEPS)]
        outputs = omni.generate([embeds(i) for i in range(len(STEPS))], params, use_tqdm=False)
    assert not any(output.error for output in outputs), [output.error for output in outputs]
    return outputs


@pytest.mark.parametrize("name", ODD)
def test_an_odd_scheduler_is_served_and_cached(name: str) -> None:
    wanted = plain(odd_pipeline(ODD[name]))
    for output, latents in zip(served(odd_pipeline(ODD[name])), wanted, strict=True):
        assert_close(output.latents, latents)
    cached = served(odd_pipeline(ODD[name]), cache_backend="magcache", cache_config={"mag_ratios": CURVE})
    assert [output.computed_steps + output.skipped_steps for output in cached] == list(STEPS)
    assert all(output.skipped_steps for output in cached)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_scheduler_is_watched_and_left_as_it_was(name: str) -> None:
    pipe = odd_pipeline(ODD[name])
    wanted, own, kind = run_latents(pipe, num_inference_steps=6), set(vars(pipe.scheduler)), type(pipe.scheduler)
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE))
    backend.enable(pipe)
    for steps in (10, 6):
        run_latents(pipe, num_inference_steps=steps)
        report = backend.last_request
        assert report is not None and report.computed_steps + report.skipped_steps == steps and report.skipped_steps
    backend.disable(pipe)
    assert set(vars(pipe.scheduler)) == own and type(pipe.scheduler) is kind
    assert torch.equal(run_latents(pipe, num_inference_steps=6), wanted)


def test_equal_schedulers_of_two_pipelines_are_two() -> None:
    one, other = odd_pipeline(ODD["equal to others, without a hash"]), tiny_flux()
    other.scheduler = Equal.from_config(other.scheduler.config)
    assert one.scheduler == other.scheduler
    backends = [MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE)) for _ in range(2)]
    for backend, pipe, steps in zip(backends, (one, other), (6, 10), strict=True):
        backend.enable(pipe)
        run_latents(pipe, num_inference_steps=steps)
    counts = [r.computed_steps + r.skipped_steps for backend in backends if (r := backend.last_request) is not None]
    assert counts == [6, 10]


class Sounding(d.FluxPipeline):
    """Steps a second scheduler beside the first, as LTX-2 does for its sound (`audio_scheduler`)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        second = self.second_scheduler
        second.set_timesteps(kwargs["num_inference_steps"], mu=1.0)

        def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors["latents"]
            moved = second.step(latents * 0.1, second.timesteps[step], latents, return_dict=False)[0]
            return {"latents": moved}

        return super().__call__(*args, callback_on_step_end=ended, **kwargs)


@pytest.mark.parametrize("same", [False, True], ids=["another", "the same one under two names"])
def test_a_second_scheduler_is_each_requests_own(same: bool) -> None:
    def make() -> Any:
        pipe = Sounding(**tiny_flux().components)
        pipe.set_progress_bar_config(disable=True)
        pipe.second_scheduler = d.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        if same:
            pipe.third_scheduler = pipe.second_scheduler
        return pipe

    wanted, pipe = plain(make()), make()
    before = dict(vars(pipe.second_scheduler))
    for output, latents in zip(served(pipe), wanted, strict=True):
        assert_close(output.latents, latents)
    assert vars(pipe.second_scheduler).keys() == before.keys() and pipe.second_scheduler.step_index is None


class Correcting(d.FlowMatchEulerDiscreteScheduler):
    """Asks the model that it holds, as correctors do."""

    asked: ClassVar[list[int]] = []

    def step(self, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(id(self.held["of"]))
        return super().step(output * self.scale, *args, **kwargs)


@pytest.mark.parametrize("of", ["transformer", "pipeline"])
def test_what_a_scheduler_holds_of_its_pipeline_is_not_copied(of: str) -> None:
    def make() -> Any:
        pipe = tiny_flux()
        pipe.scheduler = Correcting.from_config(pipe.scheduler.config)
        pipe.scheduler.held, pipe.scheduler.scale = {"of": pipe.transformer if of == "transformer" else pipe}, 0.9
        return pipe

    wanted, pipe = plain(make()), make()
    (asked := Correcting.asked).clear()
    for output, latents in zip(served(pipe), wanted, strict=True):
        assert_close(output.latents, latents)
    assert set(asked) == {id(pipe.scheduler.held["of"])} and len(asked) == sum(STEPS)


def test_the_class_of_a_watched_scheduler_is_the_class_for_all_who_keep_it() -> None:
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE))
    backend.enable(pipe)
    kind = type(pipe.scheduler)
    assert pickle.loads(pickle.dumps(kind)) is d.FlowMatchEulerDiscreteScheduler
    assert type(kind.from_config(pipe.scheduler.config)) is d.FlowMatchEulerDiscreteScheduler
    backend.disable(pipe)
