"""A cache under a cache is refused with how to undo it; the cache follows the modules that are there now."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch
from families import FAMILIES, Family
from peft import LoraConfig
from pipelines import CURVE, DEFAULTS, count_blocks, embeds, run_latents, tiny_flux
from probing import cached

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import (
    MagCacheBackend,
    MagCacheConfig,
    MagCacheStrategy,
    MagCacheStrategyRegistry,
    apply_mag_cache_hook,
    register_strategy,
)
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.cache.standalone import detach
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError

FAMILY = {family.name: family for family in FAMILIES}
CACHE = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def new_backend() -> MagCacheBackend:
    return MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE))


# --------------------------------------------------------------------------------------------- a cache is there already


def block_range(pipe: Any) -> Any:
    return d.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )


def unhook(pipe: Any, *names: str) -> None:
    registry = d.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for name in names:
        registry.remove_hook(name, recurse=True)


THEIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "first block": (
        lambda pipe: pipe.transformer.enable_cache(d.FirstBlockCacheConfig(threshold=0.2)),
        lambda pipe: pipe.transformer.disable_cache(),
        "disable_cache()",
    ),
    "magcache": (
        lambda pipe: pipe.transformer.enable_cache(
            d.MagCacheConfig(mag_ratios=list(CURVE), num_inference_steps=len(CURVE))
        ),
        lambda pipe: pipe.transformer.disable_cache(),
        "disable_cache()",
    ),
    "broadcast": (
        lambda pipe: pipe.transformer.enable_cache(block_range(pipe)),
        lambda pipe: pipe.transformer.disable_cache(),
        "disable_cache()",
    ),
    "a hook by itself": (
        lambda pipe: d.hooks.apply_first_block_cache(pipe.transformer, d.FirstBlockCacheConfig(threshold=0.2)),
        lambda pipe: unhook(pipe, "fbc_leader_block_hook", "fbc_block_hook"),
        "remove_hook(its name, recurse=True)",
    ),
    "broadcast by itself": (
        lambda pipe: d.hooks.apply_pyramid_attention_broadcast(pipe.transformer, block_range(pipe)),
        lambda pipe: unhook(pipe, "pyramid_attention_broadcast"),
        "'pyramid_attention_broadcast'",
    ),
    "a published script": (
        lambda pipe: vars(pipe.transformer).update(enable_teacache=True, cnt=0, num_steps=28),
        lambda pipe: [vars(pipe.transformer).pop(name) for name in ("enable_teacache", "cnt", "num_steps")],
        "counts its own steps (cnt, enable_teacache)",
    ),
    "a published script, on the class": (
        lambda pipe: setattr(pipe.transformer, "__class__", type("T", (type(pipe.transformer),), {"cnt": 0})),
        lambda pipe: setattr(pipe.transformer, "__class__", type(pipe.transformer).__mro__[1]),
        "runs no such script",
    ),
    "cache-dit": (
        lambda pipe: pytest.importorskip("cache_dit").enable_cache(pipe),
        lambda pipe: pytest.importorskip("cache_dit").disable_cache(pipe),
        "cache_dit.disable_cache(pipeline)",
    ),
}


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "compiled"])
def test_another_cache_is_refused_with_how_to_undo_it(theirs: str, wrapped: bool) -> None:
    put, take, how = THEIRS[theirs]
    pipe = tiny_flux()
    put(pipe)
    own = pipe.transformer
    if wrapped:
        pipe.transformer = torch.compile(own, backend="eager")
    for attempt in (
        lambda: new_backend().enable(pipe),
        lambda: Omni.from_pipe(pipe, defaults=DEFAULTS),
        lambda: Omni.from_pipe(pipe, defaults=DEFAULTS, **CACHE),
        lambda: apply_mag_cache_hook(pipe.transformer, MagCacheConfig(mag_ratios=CURVE)),
    ):
        with pytest.raises(InvalidValueError) as refused:
            attempt()
        assert how in str(refused.value)
    pipe.transformer = own
    take(pipe)
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=10)
        assert backend.last_request is not None and backend.last_request.skipped_steps > 0


@pytest.mark.parametrize(("name", "config"), [("magcache", {"mag_ratios": CURVE}), ("fbcache", {}), ("seacache", {})])
def test_a_second_backend_is_refused_and_the_first_goes_on(name: str, config: dict[str, Any]) -> None:
    pipe = tiny_flux()
    plain = run_latents(pipe, num_inference_steps=10)
    with cached(pipe) as backend:
        own = run_latents(pipe, num_inference_steps=10)
        config = (
            {"mag_ratios": CURVE} if name == "magcache" else {"coefficients": [1.0, 0.0]} if name == "teacache" else {}
        )
        other = get_cache_backend(name, config)
        assert other is not None
        for attempt in (
            lambda: other.enable(pipe),
            lambda: Omni.from_pipe(pipe, defaults=DEFAULTS),
            lambda: Omni.from_pipe(pipe, defaults=DEFAULTS, **CACHE),
        ):
            with pytest.raises(InvalidValueError, match=r"disable\(pipeline\)"):
                attempt()
        other.disable(pipe)
        assert torch.equal(run_latents(pipe, num_inference_steps=10), own)
        assert backend.last_request is not None and backend.last_request.skipped_steps > 0
    assert torch.equal(run_latents(pipe, num_inference_steps=10), plain)


@pytest.mark.parametrize("first", ["wrapper", "inside"])
def test_a_compiled_wrapper_hides_no_cache(first: str) -> None:
    pipe, wrapped = tiny_flux(), tiny_flux()
    wrapped.transformer = torch.compile(pipe.transformer, backend="eager")
    enabled, other = (wrapped, pipe) if first == "wrapper" else (pipe, wrapped)
    with cached(enabled):
        for attempt in (lambda: new_backend().enable(other), lambda: Omni.from_pipe(other, defaults=DEFAULTS)):
            with pytest.raises(InvalidValueError, match=r"disable\(pipeline\)"):
                attempt()
    with cached(other):
        pass


@pytest.mark.slow
def test_a_wrapper_put_on_and_taken_off_while_enabled_is_followed() -> None:
    pipe = tiny_flux()
    own, plain = pipe.transformer, run_latents(pipe, num_inference_steps=10)
    torch.compiler.reset()
    with cached(pipe) as backend:
        latents = run_latents(pipe, num_inference_steps=10)
        for denoiser in (torch.compile(own, backend="eager"), own):
            pipe.transformer = denoiser
            assert distance(run_latents(pipe, num_inference_steps=10), latents) < 1e-4
            assert backend.last_request is not None and backend.last_request.skipped_steps > 0
    assert distance(run_latents(pipe, num_inference_steps=10), plain) < 1e-5
    assert not own._forward_hooks and "cache_context" not in vars(own)


def test_a_cache_that_comes_after_the_engine_is_refused_by_the_request() -> None:
    pipe = tiny_flux()
    params = Params(num_inference_steps=10, seed=0, output_type="latent")
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **CACHE) as omni:
        first = omni.generate(embeds(0), params, use_tqdm=False)[0]
        backend = new_backend()
        backend.enable(pipe)
        refused = omni.generate(embeds(0), params, use_tqdm=False)[0]
        assert isinstance(refused.error, InvalidValueError) and "disable(pipeline)" in str(refused.error)
        backend.disable(pipe)
        again = omni.generate(embeds(0), params, use_tqdm=False)[0]
    assert again.ok and torch.equal(again.latents, first.latents)


@pytest.mark.parametrize("theirs", [name for name in THEIRS if name != "cache-dit"])
def test_a_cache_that_comes_after_ours_is_refused_by_the_next_run(theirs: str) -> None:
    put, take, how = THEIRS[theirs]
    pipe = tiny_flux()
    with cached(pipe) as backend:
        own = run_latents(pipe, num_inference_steps=10)
        put(pipe)
        with pytest.raises(InvalidValueError) as refused:
            run_latents(pipe, num_inference_steps=10)
        assert how in str(refused.value)
        take(pipe)
        assert torch.equal(run_latents(pipe, num_inference_steps=10), own)
        assert backend.last_request is not None and backend.last_request.skipped_steps > 0


def test_a_hook_of_ours_says_how_to_take_it_off() -> None:
    pipe = tiny_flux()
    apply_mag_cache_hook(pipe.transformer, MagCacheConfig(mag_ratios=CURVE))
    for attempt in (lambda: new_backend().enable(pipe), lambda: Omni.from_pipe(pipe, defaults=DEFAULTS)):
        with pytest.raises(InvalidValueError, match=r"detach\(denoiser\)"):
            attempt()
    detach(pipe.transformer)
    with cached(pipe):
        pass


def test_a_pipeline_dropped_while_enabled_is_freed() -> None:
    pipe = tiny_flux()
    backend = new_backend()
    backend.enable(pipe)
    run_latents(pipe, num_inference_steps=4)
    gone = weakref.ref(pipe.transformer)
    del pipe, backend
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------------- what is there by now


def test_blocks_and_denoisers_replaced_while_enabled_are_followed() -> None:
    pipe, other = tiny_flux(), tiny_flux(seed=1)
    first = pipe.transformer

    def check(computed: int | None = None) -> None:
        blocks = count_blocks(pipe)
        latents = run_latents(pipe, num_inference_steps=10)
        assert backend.last_request is not None
        assert blocks.count == backend.last_request.computed_steps < 10
        blocks.remove()
        reference = tiny_flux()
        reference.transformer = pipe.transformer
        backend.disable(pipe)
        assert distance(latents, run_latents(reference, num_inference_steps=10)) < 0.1
        backend.enable(pipe)

    backend = new_backend()
    backend.enable(pipe)
    check()
    pipe.transformer.transformer_blocks[1] = other.transformer.transformer_blocks[1]
    check()
    pipe.transformer.transformer_blocks[0] = other.transformer.transformer_blocks[0]
    check()
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleList(other.transformer.single_transformer_blocks[:2])
    check()
    pipe.transformer = tiny_flux(seed=2).transformer
    check()
    assert not first._forward_hooks and "cache_context" not in vars(first)
    backend.disable(pipe)
    assert type(pipe.scheduler) is d.FlowMatchEulerDiscreteScheduler


def with_adapters() -> Any:
    pipe = tiny_flux()
    torch.manual_seed(0)
    for name in ("ink", "clay"):
        config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
        pipe.transformer.add_adapter(config, adapter_name=name)
    pipe.transformer.set_adapters(["ink"], [1.0])
    return pipe


SWITCHES: dict[str, Callable[[Any], None]] = {
    "another": lambda pipe: pipe.transformer.set_adapters(["clay"], [1.0]),
    "both": lambda pipe: pipe.transformer.set_adapters(["ink", "clay"], [1.0, 0.3]),
    "weaker": lambda pipe: pipe.transformer.set_adapters(["ink"], [0.25]),
    "off": lambda pipe: pipe.transformer.disable_adapters(),
    "fused": lambda pipe: pipe.transformer.fuse_lora(),
    "scale of the call": lambda pipe: pipe._joint_attention_kwargs.update(scale=0.25),
}


@pytest.mark.parametrize("backend_name", ["magcache", "fbcache"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_what_was_kept_before_adapters_are_switched_is_not_forecast_with(switch: str, backend_name: str) -> None:
    """The step after a switch computes: the latents are those of a run that skips only before it."""
    pipe = with_adapters()
    ran: list[int] = []
    pipe.transformer.single_transformer_blocks[-1].register_forward_pre_hook(lambda *_: ran.append(len(steps)))
    steps: list[int] = []

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == at:
            SWITCHES[switch](pipeline)
        return tensors

    def run() -> torch.Tensor:
        pipe.transformer.enable_adapters()
        pipe.transformer.unfuse_lora() if switch == "fused" and at is not None and steps else None
        pipe.transformer.set_adapters(["ink"], [1.0])
        ran.clear(), steps.clear()
        more = {"callback_on_step_end": callback, "joint_attention_kwargs": {"scale": 1.0}}
        return run_latents(pipe, num_inference_steps=16, **more)

    at: int | None = None
    config = {"mag_ratios": CURVE} if backend_name == "magcache" else {"rel_l1_thresh": 0.5}
    backend = get_cache_backend(backend_name, config)
    assert backend is not None
    backend.enable(pipe)
    run()
    skipped = [step for step in range(1, 16) if step not in ran]
    at = skipped[0] - 1 if backend_name == "magcache" else skipped[1] - 1  # the step after would be forecast
    run()
    assert at + 1 in ran
    backend.disable(pipe)


# -------------------------------------------------------------------------------------- anything that has a transformer


class Slotted:
    __slots__ = ("transformer",)

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


@pytest.mark.parametrize("kind", [types.SimpleNamespace, Slotted], ids=lambda kind: kind.__name__)
def test_a_pipeline_may_be_anything_with_a_transformer(kind: Callable[..., Any]) -> None:
    """Its calls are counted: two runs of ten, driven by a pipeline that the backend never saw."""
    pipe = tiny_flux()
    plain = run_latents(pipe, num_inference_steps=10)
    bare = kind(transformer=pipe.transformer)
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE, num_inference_steps=10))
    backend.enable(bare)
    blocks = count_blocks(pipe)
    for _ in range(2):
        blocks.reset()
        backend.refresh(bare, 10)
        assert distance(run_latents(pipe, num_inference_steps=10), plain) < 0.1
        assert backend.last_request is not None
        assert blocks.count == backend.last_request.computed_steps < 10
    backend.refresh(bare, 6)
    run_latents(pipe, num_inference_steps=6)
    assert backend.last_request is not None and backend.last_request.plan is not None
    last = backend.last_request
    assert last.computed_steps + last.skipped_steps == len(last.plan.compute) == 6
    backend.disable(bare)
    assert torch.equal(run_latents(pipe, num_inference_steps=10), plain)
    bare.transformer = None
    with pytest.raises(InvalidValueError):
        backend.enable(bare)


PLAIN = [family for family in FAMILIES if "two experts" not in family.name and not family.steps_aside]


WAYS = [("hook", family) for family in PLAIN] + [("strategy", FAMILY[name]) for name in ("FLUX.1", "FLUX.2", "Wan 2.1")]


@pytest.mark.parametrize(("way", "family"), WAYS, ids=[f"{way}-{family.name}" for way, family in WAYS])
def test_a_curve_is_all_that_a_known_denoiser_needs(way: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 8
    pipe = family.build()

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
        return next(iter(pipe(**family.prompt(0), **family.settings, **call).values()))

    wanted = run()
    ratios = [1.0] * steps
    if way == "hook":
        apply_mag_cache_hook(pipe.transformer, MagCacheConfig(mag_ratios=ratios, num_inference_steps=steps))
        got = run()
        detach(pipe.transformer)
    else:
        monkeypatch.setattr(MagCacheStrategyRegistry, "_strategies", dict(MagCacheStrategyRegistry._strategies))
        monkeypatch.setattr(MagCacheStrategyRegistry, "_own", set())
        curve = type("Curve", (MagCacheStrategy,), {"mag_ratios": ratios})
        register_strategy(type(pipe.transformer).__name__, curve())
        backend = MagCacheBackend(DiffusionCacheConfig())
        backend.enable(pipe)
        got = run()
        assert backend.last_request is not None
        assert backend.last_request.computed_steps + backend.last_request.skipped_steps == steps
        assert backend.last_request.skipped_steps > 0
        backend.disable(pipe)
    assert torch.isfinite(got).all() and 0 < distance(got, wanted) < 0.5
    assert torch.equal(run(), wanted)
