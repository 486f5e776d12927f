"""A scheduler is the pipeline's own: copied, patched, exchanged, shared, pickled and saved while a cache watches it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from families import FAMILIES
from patching import PATCHES, closure, twice
from PIL import Image
from pipelines import CURVE, DEFAULTS, count_blocks, embeds, run_latents, tiny_flux
from probing import cached
from stepping import add

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError

FAMILY = {family.name: family for family in FAMILIES}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def new_backend() -> MagCacheBackend:
    return MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE))


def served(pipe: Any, counts: list[int], **more: Any) -> list[Any]:
    """Requests of these step counts side by side."""
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **more) as omni:
        params = [Params(num_inference_steps=n, seed=i, output_type="latent") for i, n in enumerate(counts)]
        outputs = omni.generate([embeds(i) for i in range(len(counts))], params, use_tqdm=False)
    for output in outputs:
        assert output.ok, output.error
    return outputs


# ------------------------------------------------------------------------------------------------------------- patched


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_patched_scheduler_counts_in_the_engine_as_in_the_plain_pipeline(patch: Callable[[Any], None]) -> None:
    pipe, counts = tiny_flux(), [4, 7, 5]
    bare = run_latents(pipe, num_inference_steps=4)
    patch(pipe)
    patched = vars(pipe.scheduler).get("step")
    plain = [run_latents(pipe, i=i, seed=i, num_inference_steps=n) for i, n in enumerate(counts)]
    assert distance(plain[0], bare) > 0.01
    before = pipe.scheduler.timesteps.clone(), pipe.scheduler.step_index
    outputs = served(pipe, counts)
    for output, wanted in zip(outputs, plain, strict=True):
        assert distance(output.latents, wanted) < 1e-5
    assert torch.equal(pipe.scheduler.timesteps, before[0]) and pipe.scheduler.step_index == before[1]
    assert vars(pipe.scheduler).get("step") is patched
    assert torch.equal(run_latents(pipe, num_inference_steps=4), plain[0])
    cached_outputs = served(pipe, [12, 9], cache_backend="magcache", cache_config={"mag_ratios": CURVE})
    assert [(o.computed_steps + o.skipped_steps, o.skipped_steps > 0) for o in cached_outputs] == [
        (12, True),
        (9, True),
    ]


@pytest.mark.parametrize("first", ["patched", "enabled"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_patch_is_seen_while_enabled_and_survives_disable(patch: Callable[[Any], None], first: str) -> None:
    pipe = tiny_flux()
    reference = tiny_flux()
    patch(reference)
    wanted = run_latents(reference, num_inference_steps=10)
    backend, blocks = new_backend(), count_blocks(pipe)
    if first == "patched":
        patch(pipe)
    backend.enable(pipe)
    if first == "enabled":
        patch(pipe)
    for steps in (10, 6):
        blocks.reset()
        latents = run_latents(pipe, num_inference_steps=steps)
        state = backend.last_request
        assert state is not None and state.plan is not None
        assert (len(state.plan.compute), state.computed_steps) == (steps, sum(state.plan.compute))
        assert blocks.count == sum(state.plan.compute) < steps
        if steps == 10:
            assert distance(latents, wanted) < 0.1
    backend.disable(pipe)
    assert torch.equal(run_latents(pipe, num_inference_steps=10), wanted)
    assert type(pipe.scheduler) is d.FlowMatchEulerDiscreteScheduler


def test_a_patch_that_is_taken_off_while_enabled_is_gone() -> None:
    pipe = tiny_flux()
    bare = run_latents(pipe, num_inference_steps=6)
    with cached(pipe) as backend:
        twice(pipe)
        run_latents(pipe, num_inference_steps=6)
        del pipe.scheduler.step
        run_latents(pipe, num_inference_steps=6)
        assert backend.last_request is not None
        assert backend.last_request.computed_steps + backend.last_request.skipped_steps == 6
    assert torch.equal(run_latents(pipe, num_inference_steps=6), bare)


def test_what_was_set_on_the_instance_counts() -> None:
    family = FAMILY["Stable Diffusion 3"]
    pipe = family.build()

    def plain() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        call = dict(num_inference_steps=6, output_type="latent", generator=generator)
        return pipe(**family.prompt(0), **family.settings, **call).images

    def engine(omni: Omni) -> torch.Tensor:
        params = Params(num_inference_steps=6, seed=1, output_type="latent", **family.settings)
        return omni.generate(family.prompt(0), params, use_tqdm=False)[0].latents

    with Omni.from_pipe(pipe) as omni:
        before = plain()
        assert torch.equal(engine(omni), before)
        pipe.scheduler.set_shift(7.0)  # between two requests
        wanted = plain()
        assert distance(wanted, before) > 0.01
        assert torch.equal(engine(omni), wanted)
    with cached(pipe, mag_ratios=[1.0] * 6) as backend:
        assert distance(plain(), wanted) < 0.1
        pipe.scheduler.set_shift(1.0)
        plain()
        assert backend.last_request is not None
        assert backend.last_request.computed_steps + backend.last_request.skipped_steps == 6
    assert pipe.scheduler.shift == 1.0 and distance(plain(), wanted) > 0.01


# ------------------------------------------------------------------------------------------------- exchanged, multistep


class Mine(d.FlowMatchEulerDiscreteScheduler):
    """A user's own, with state of its own and a step that calls its parent's."""

    made = 0

    def step(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        self.made += 1
        return super().step(output * (0.9 + 0.01 * self.made), *args, **kwargs)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.made = 0
        super().set_timesteps(*args, **kwargs)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
OTHERS: list[tuple[type, dict[str, Any]]] = [
    (Mine, {}),
    (d.FlowMatchHeunDiscreteScheduler, {}),
    (d.UniPCMultistepScheduler, FLOW),
    (d.DPMSolverMultistepScheduler, FLOW | {"solver_order": 3}),
    (d.DEISMultistepScheduler, FLOW),
]


def wan(scheduler: type, settings: dict[str, Any], pipe: Any = None) -> Any:
    pipe = pipe or FAMILY["Wan 2.1"].build()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)  # type: ignore[attr-defined]
    return pipe


def wan_latents(pipe: Any, i: int, steps: int) -> torch.Tensor:
    family = FAMILY["Wan 2.1"]
    call = dict(num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(i))
    return pipe(**family.prompt(i), **family.settings, **call).frames


@pytest.mark.parametrize(("scheduler", "settings"), OTHERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_scheduler_that_was_put_in_between_runs_steps_each_request_itself(
    scheduler: type, settings: dict[str, Any]
) -> None:
    family, counts = FAMILY["Wan 2.1"], [6, 9, 7]
    plain = [wan_latents(wan(scheduler, settings), i, n) for i, n in enumerate(counts)]
    params = [
        Params(num_inference_steps=n, seed=i, output_type="latent", **family.settings) for i, n in enumerate(counts)
    ]
    pipe = family.build()
    with Omni.from_pipe(pipe) as omni:
        omni.generate(family.prompt(0), params[0], use_tqdm=False)
        wan(scheduler, settings, pipe)
        outputs = omni.generate([family.prompt(i) for i in range(3)], params, use_tqdm=False)
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert distance(output.latents, wanted) < 1e-4
    pipe = family.build()
    with cached(pipe, mag_ratios=[1.0] * 10) as backend:
        wan_latents(pipe, 0, 5)
        wan(scheduler, settings, pipe)
        for i, steps in enumerate(counts):
            latents = wan_latents(pipe, i, steps)
            state = backend.last_request
            assert state is not None and state.plan is not None
            assert len(state.plan.compute) == pipe._num_timesteps == state.computed_steps + state.skipped_steps
            assert state.skipped_steps > 0 and distance(latents, plain[i]) < 0.2
    assert distance(wan_latents(pipe, 0, counts[0]), plain[0]) == 0


# ----------------------------------------------------------------------------------------------- copied, pickled, saved


@pytest.mark.parametrize("patch", [None, closure], ids=["bare", "patched"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: type(s).from_config(s.config)])
def test_a_copy_of_a_watched_scheduler_steps_itself(copied: Callable[[Any], Any], patch: Any) -> None:
    pipe = tiny_flux()
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=10)
        other = copied(pipe.scheduler)
        assert type(other) is d.FlowMatchEulerDiscreteScheduler
        if patch is not None:  # a patch made before the copy refers to the original, in plain diffusers too
            patch(pipe)
        state = backend.last_request
        other.set_timesteps(5, mu=1.0)
        sample = torch.ones(1, 4)
        other.step(sample, other.timesteps[0], sample)
        assert (len(other.timesteps), other.step_index) == (5, 1)
        assert (len(pipe.scheduler.timesteps), pipe.scheduler.step_index) == (10, 10)
        assert backend.last_request is state


class Copies(d.FluxPipeline):
    """Steps a copy of its scheduler, made within the call, as LTX-2 and SkyReels-V2 do."""

    how: Callable[[Any], Any] = copy.deepcopy

    def __call__(self, **kwargs: Any) -> Any:
        own, self.scheduler = self.scheduler, type(self).how(self.scheduler)
        try:
            return super().__call__(**kwargs)
        finally:
            self.scheduler = own


class ShallowCopies(Copies):
    how = copy.copy


@pytest.mark.parametrize("kind", [Copies, ShallowCopies])
@pytest.mark.parametrize("cache", [{}, {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}])
def test_a_pipeline_that_copies_its_scheduler_within_its_call(kind: type, cache: dict[str, Any]) -> None:
    pipe, counts = tiny_flux(), [10, 6]
    plain = [run_latents(pipe, i=i, seed=i, num_inference_steps=n) for i, n in enumerate(counts)]
    pipe.__class__ = kind
    outputs = served(pipe, counts, **cache)
    for output, wanted, steps in zip(outputs, plain, counts, strict=True):
        assert output.num_inference_steps == steps == output.computed_steps + output.skipped_steps
        assert bool(output.skipped_steps) == bool(cache)
        assert distance(output.latents, wanted) < (0.1 if cache else 1e-5)
    backend = new_backend()
    backend.enable(pipe)
    for i, steps in enumerate(counts):
        latents = run_latents(pipe, i=i, seed=i, num_inference_steps=steps)
        assert distance(latents, outputs[i].latents) < (1e-5 if cache else 0.1)
    backend.disable(pipe)
    assert torch.equal(run_latents(pipe, num_inference_steps=10), plain[0])


def test_a_deep_copy_of_a_cached_pipeline_is_cached_on_its_own() -> None:
    pipe = tiny_flux()
    plain = {n: run_latents(pipe, num_inference_steps=n) for n in (10, 6)}
    with cached(pipe) as backend:
        own = run_latents(pipe, num_inference_steps=10)
        twin = copy.deepcopy(pipe)
        assert torch.equal(run_latents(twin, num_inference_steps=10), own)
        assert distance(run_latents(twin, num_inference_steps=6), plain[6]) < 0.1
        assert len(pipe.scheduler.timesteps) == 10
        assert backend.last_request is not None and backend.last_request.computed_steps < 10
        assert torch.equal(run_latents(pipe, num_inference_steps=10), own)
    assert torch.equal(run_latents(pipe, num_inference_steps=10), plain[10])
    assert torch.equal(run_latents(twin, num_inference_steps=10), own)


def test_saving_and_pickling_while_enabled(tmp_path: Path) -> None:
    pipe = tiny_flux()
    plain = run_latents(pipe, num_inference_steps=6)
    bare = {name: set(vars(part)) for name, part in (("s", pipe.scheduler), ("t", pipe.transformer))}
    with cached(pipe):
        run_latents(pipe, num_inference_steps=6)
        for load in (pickle.loads, lambda data: copy.deepcopy(pickle.loads(data))):
            scheduler = load(pickle.dumps(pipe.scheduler))
            assert type(scheduler) is d.FlowMatchEulerDiscreteScheduler and len(scheduler.timesteps) == 6
        torch.save(pipe.transformer, tmp_path / "transformer.pt")
        pipe.save_pretrained(tmp_path / "pipe")
    transformer = torch.load(tmp_path / "transformer.pt", weights_only=False)
    empty = {name: None for name, part in pipe.components.items() if part is None}
    for other in (
        d.FluxPipeline(**pipe.components | {"transformer": transformer}),
        d.FluxPipeline.from_pretrained(tmp_path / "pipe", **empty),
        d.FluxPipeline(**pipe.components | {"scheduler": scheduler}),
    ):
        other.set_progress_bar_config(disable=True)
        blocks = count_blocks(other)
        assert torch.equal(run_latents(other, num_inference_steps=6), plain) and blocks.count == 6
        blocks.remove()
        with cached(other) as backend:
            assert distance(run_latents(other, num_inference_steps=10), plain) < 0.3
            assert backend.last_request is not None and backend.last_request.skipped_steps > 0
    assert {name: set(vars(part)) for name, part in (("s", pipe.scheduler), ("t", pipe.transformer))} == bare


# -------------------------------------------------------------------------------------------------------------- shared


def two_pipelines() -> tuple[Any, Any]:
    """Text to image and image to image over one transformer and one scheduler."""
    one = tiny_flux()
    other = d.FluxImg2ImgPipeline(
        **{name: one.components[name] for name in ("scheduler", "vae", "transformer")},
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    other.set_progress_bar_config(disable=True)
    assert one.scheduler is other.scheduler
    return one, other


def image_latents(pipe: Any, steps: int, strength: float) -> torch.Tensor:
    call = dict(image=Image.effect_noise((32, 32), 90).convert("RGB"), strength=strength, num_inference_steps=steps)
    return pipe(
        **call, **embeds(0), **DEFAULTS, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images


@pytest.mark.parametrize(("first", "second", "strength"), [(None, 28, 0.6), (10, 28, 1.0), (28, 10, 0.6), (20, 4, 1.0)])
def test_two_pipelines_over_one_transformer_plan_for_the_run_that_begins(
    first: int | None, second: int, strength: float
) -> None:
    one, other = two_pipelines()
    blocks = count_blocks(one)
    runs = math.ceil(second * strength)
    for enabled, elsewhere in ((one, other), (other, one)):
        with cached(enabled) as backend:
            if first is not None:
                run_latents(one, num_inference_steps=first)
                assert backend.last_request is not None
                assert backend.last_request.computed_steps + backend.last_request.skipped_steps == first
            blocks.reset()
            image_latents(other, second, strength)
            state = backend.last_request
            assert state is not None and state.plan is not None
            assert len(state.plan.compute) == runs == state.computed_steps + state.skipped_steps
            assert blocks.count == state.computed_steps < runs
            run_latents(one, num_inference_steps=7)
            assert backend.last_request is not None and backend.last_request.plan is not None
            assert len(backend.last_request.plan.compute) == 7
        assert type(elsewhere.scheduler) is d.FlowMatchEulerDiscreteScheduler


def test_refresh_with_another_pipeline_means_that_one() -> None:
    one, other = two_pipelines()
    plain = run_latents(one, num_inference_steps=10)
    other.scheduler = copy.deepcopy(one.scheduler)
    other.transformer = copy.deepcopy(one.transformer)
    backend = new_backend()
    backend.enable(one)
    backend.refresh(other, 10)
    image_latents(other, 10, 0.6)
    state = backend.last_request
    assert state is not None and state.plan is not None
    assert len(state.plan.compute) == 6 == state.computed_steps + state.skipped_steps
    assert torch.equal(run_latents(one, num_inference_steps=10), plain)  # bare again
    with pytest.raises(InvalidValueError, match="disable"):
        new_backend().enable(other)
    backend.disable(other)
    assert type(other.scheduler) is type(one.scheduler) is d.FlowMatchEulerDiscreteScheduler


def test_one_scheduler_under_two_engines() -> None:
    """Each with a model of its own; requests of both at once."""
    one, other = tiny_flux(), tiny_flux(seed=1)
    other.scheduler = one.scheduler
    closure(one)
    plain = [run_latents(pipe, num_inference_steps=n) for pipe, n in ((one, 6), (other, 9))]
    engines = [Omni.from_pipe(pipe, defaults=DEFAULTS) for pipe in (one, other)]
    for omni, steps in zip(engines, (6, 9), strict=True):
        add(omni, "a", embeds(0), Params(num_inference_steps=steps, seed=0, output_type="latent"))
    ended: list[Any] = []
    while any(omni.engine.has_unfinished_requests() for omni in engines):
        ended += [output for omni in engines for output in omni.engine.step()]
    for omni in engines:
        omni.close()
    for output, wanted in zip(ended, plain, strict=True):
        assert output.ok, output.error
        assert distance(output.latents, wanted) < 1e-5
