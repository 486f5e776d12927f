"""Continuous batching with a cache per request: equal to solo runs, faults, aborts, memory; small random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from allocating import counted, faults
from closeness import assert_close, levels_apart
from diffusers import FlowMatchEulerDiscreteScheduler
from lanes import lane
from pipelines import CURVE, DEFAULTS, BlockCounter, embeds, negative, tiny_flux
from stepping import add, drain

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import EngineClosedError, RequestAbortedError

DEMO_PROMPTS = [
    "red apple", "penguin", "rocket", "banana", "guitar", "octopus", "rainbow", "panda face", "hamburger", "cactus",
]  # fmt: skip


def mixed_requests(latent: bool) -> list[Params]:
    caches: list[Any] = [
        None,
        "off",
        "high",
        {"threshold": 0.5},
        None,
        {"predictor": "linear"},
        "fast",
        {"enabled": False},
    ]
    steps = [4, 28, 10, 50, 7, 20, 13, 28]
    return [
        Params(
            num_inference_steps=steps[i],
            seed=100 + i,
            guidance_scale=1.0 + i / 2,
            num_outputs_per_prompt=1 + i % 3 // 2,
            cache=caches[i],
            output_type="latent" if latent else None,
        )
        for i in range(8)
    ]


@pytest.mark.parametrize("latent", lane([True, False], lambda latent: latent))
def test_a_mixed_batch_on_the_demo_model_equals_solo_runs(demo: Omni, latent: bool) -> None:
    """Requests that join and leave one batch at different steps, one aborted, one failing: each equals its solo run."""
    params = mixed_requests(latent)
    outputs: dict[str, Any] = {}
    for i, p in enumerate(params):
        add(demo, str(i), DEMO_PROMPTS[i], p)
        if i == 2:
            add(demo, "aborted", DEMO_PROMPTS[8], Params(num_inference_steps=50, seed=1))
            add(demo, "failing", {"prompt": DEMO_PROMPTS[9], "prompt_2": 17}, Params(num_inference_steps=9, seed=1))
        for _ in range(3):  # arrivals are spread over the others' steps
            outputs |= {o.request_id: o for o in demo.engine.step()}
        if i == 5:
            demo.engine.abort(["aborted"])
    drain(demo, outputs)
    assert isinstance(outputs["aborted"].error, RequestAbortedError)
    assert isinstance(outputs["failing"].error, ValueError)
    assert demo.engine.worker.cache_bytes == 0
    for i, p in enumerate(params):
        solo = demo.generate(DEMO_PROMPTS[i], p, use_tqdm=False)[0]
        mixed = outputs[str(i)]
        assert solo.ok and mixed.ok
        assert (solo.plan, solo.computed_steps, solo.skipped_steps) == (
            mixed.plan,
            mixed.computed_steps,
            mixed.skipped_steps,
        )
        if latent:
            assert_close(mixed.latents, solo.latents, p)
        else:
            assert len(mixed.images) == p.num_outputs_per_prompt
            assert all(levels_apart(a, b) <= 1 for a, b in zip(solo.images, mixed.images, strict=True))


def test_a_mixed_batch_with_two_branches_equals_solo_runs(tiny: Omni) -> None:
    params = [
        Params(
            num_inference_steps=4 + 3 * i, seed=i, true_cfg_scale=1.5 + i, guidance_scale=1 + i, output_type="latent"
        )
        for i in range(6)
    ]
    prompts = [embeds(i) | (negative(i) if i % 2 == 0 else {}) for i in range(6)]
    mixed = tiny.generate(prompts, params, use_tqdm=False)
    for i in range(6):
        solo = tiny.generate(prompts[i], params[i], use_tqdm=False)[0]
        assert mixed[i].skipped_steps == solo.skipped_steps > 0
        assert_close(mixed[i].latents, solo.latents)
    assert tiny.engine.worker.cache_bytes == 0


def test_a_request_alone_equals_plain_diffusers_bit_for_bit() -> None:
    pipeline = tiny_flux()
    plain = pipeline(
        **embeds(0),
        **DEFAULTS,
        num_inference_steps=9,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="latent",
    ).images
    with Omni.from_pipe(pipeline, defaults=DEFAULTS) as omni:
        ours = omni.generate(embeds(0), Params(num_inference_steps=9, seed=5, output_type="latent"), use_tqdm=False)[0]
    assert torch.equal(plain, ours.latents)


def test_the_number_of_full_forwards_is_that_of_the_plan(tiny: Omni) -> None:
    counter = BlockCounter(tiny.engine.worker.pipeline.transformer.transformer_blocks[0])
    outputs = tiny.generate(
        [embeds(i) for i in range(5)],
        [Params(num_inference_steps=n, seed=n, output_type="latent") for n in (4, 10, 28, 50, 13)],
        use_tqdm=False,
    )
    assert counter.rows == sum(sum(o.plan) for o in outputs) == sum(o.computed_steps for o in outputs)
    assert counter.count < counter.rows  # they were really batched
    for output in outputs:
        assert len(output.plan) == output.num_inference_steps == output.computed_steps + output.skipped_steps


def test_an_omitted_step_count_is_the_pipelines_default(tiny: Omni) -> None:
    output = tiny.generate(embeds(0), Params(seed=0, output_type="latent"), use_tqdm=False)[0]
    assert output.num_inference_steps == 28 == len(output.plan)
    assert not output.latents.is_inference()


def test_each_request_of_a_batch_skips_its_own_steps(tiny: Omni) -> None:
    off, on = tiny.generate(
        [embeds(0), embeds(1)],
        [Params(num_inference_steps=12, seed=0, cache="off", output_type="latent"),
         Params(num_inference_steps=12, seed=1, output_type="latent")],
        use_tqdm=False,
    )  # fmt: skip
    assert (off.computed_steps, off.skipped_steps) == (12, 0)
    assert on.skipped_steps > 0


class PickyScheduler(FlowMatchEulerDiscreteScheduler):
    """A scheduler that cannot step samples above a million."""

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.abs().max() > 1e6:
            raise FloatingPointError("the sample has exploded")
        return super().step(model_output, timestep, sample, *args, **kwargs)


def test_a_fault_in_a_batch_fails_only_its_own_request() -> None:
    """In text encoding, in a joint forward, in its scheduler, in decoding."""
    pipeline = tiny_flux()
    pipeline.scheduler = PickyScheduler.from_config(pipeline.scheduler.config)

    def poison(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if (kwargs["pooled_projections"][:, 0] == 777).any():
            raise ArithmeticError("a poisoned row")

    pipeline.transformer.register_forward_pre_hook(poison, with_kwargs=True)

    def small_only(module: torch.nn.Module, args: Any) -> None:
        if args[0].shape[-1] > 16:
            raise MemoryError("too large to decode")

    pipeline.vae.post_quant_conv.register_forward_pre_hook(small_only)
    poisoned = embeds(1)
    poisoned["pooled_prompt_embeds"][:, 0] = 777
    huge = torch.full((1, 64, 16), 1e7)
    with Omni.from_pipe(
        pipeline, cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults=DEFAULTS
    ) as omni:
        good = Params(num_inference_steps=8, seed=3)
        alone = omni.generate(embeds(0), good, use_tqdm=False)[0]
        prompts = [embeds(0), "no text encoder", poisoned, embeds(2), embeds(3), embeds(0)]
        params = [
            good,
            good,
            good,
            Params(num_inference_steps=8, latents=huge),
            Params(num_inference_steps=8, height=64, width=64),
            good,
        ]
        outputs = omni.generate(prompts, params, use_tqdm=False)
        kinds = [type(o.error) for o in outputs]
        assert kinds[2:5] == [ArithmeticError, FloatingPointError, MemoryError], kinds
        assert outputs[1].error is not None
        for survivor in (outputs[0], outputs[5]):
            assert survivor.ok and levels_apart(survivor.images[0], alone.images[0]) <= 1
        assert omni.engine.worker.cache_bytes == 0
        assert not omni.engine.has_unfinished_requests()


def test_abort_at_every_stage_frees_its_memory(tiny: Omni) -> None:
    for ticks in (0, 1, 2, 5):
        add(tiny, "a", embeds(0), Params(num_inference_steps=12, seed=0))
        add(tiny, "b", embeds(1), Params(num_inference_steps=12, seed=1, output_type="latent"))
        outputs: dict[str, Any] = {}
        for _ in range(ticks):
            outputs |= {o.request_id: o for o in tiny.engine.step()}
        tiny.engine.abort(["a", "unknown"])
        drain(tiny, outputs)
        assert isinstance(outputs["a"].error, RequestAbortedError) and outputs["b"].ok
        assert tiny.engine.worker.cache_bytes == 0


def test_waiting_requests_can_be_aborted_and_all_others_end() -> None:
    """More requests than places, two shapes that cannot share a forward: all end, in bounded time."""
    with Omni.from_pipe(tiny_flux(), max_num_seqs=2, defaults=DEFAULTS) as omni:
        for i in range(6):
            size = 32 if i % 2 else 48
            add(
                omni,
                str(i),
                embeds(i),
                Params(num_inference_steps=5, seed=i, height=size, width=size, output_type="latent"),
            )
        omni.engine.abort(["5"])
        outputs = drain(omni, {})
        assert len(outputs) == 6 and outputs["5"].error is not None
        assert all(outputs[str(i)].ok for i in range(5))
        assert outputs["0"].latents.shape[1] == 144 and outputs["1"].latents.shape[1] == 64


def test_a_memory_budget_of_one_residual_makes_others_compute() -> None:
    one = 64 * 32 * 4  # image tokens x width x fp32
    pipeline = tiny_flux()
    prompts = [embeds(i) for i in range(4)]
    params = [Params(num_inference_steps=12, seed=i, output_type="latent") for i in range(4)]
    with Omni.from_pipe(
        pipeline,
        cache_backend="magcache",
        cache_config={"mag_ratios": CURVE, "memory_budget_mb": one / 2**20},
        defaults=DEFAULTS,
    ) as omni:
        limited = omni.generate(prompts, params, use_tqdm=False)
        uncached = omni.generate(prompts, [p.model_copy(update={"cache": "off"}) for p in params], use_tqdm=False)
        store = next(iter(omni.engine.worker._backends.values())).store
        assert store.peak == one and store.used == 0
    computed = [o.computed_steps for o in limited]
    assert min(computed) < 12 and max(computed) == 12, computed
    for a, b in zip(limited, uncached, strict=True):
        if a.computed_steps == 12:
            assert_close(a.latents, b.latents)


def test_outputs_are_in_input_order_with_errors_in_place(tiny: Omni) -> None:
    outputs = tiny.generate(
        [embeds(0), "", embeds(1)],
        [Params(num_inference_steps=9, seed=0, output_type="latent")] * 3,
        use_tqdm=True,
    )
    assert [o.ok for o in outputs] == [True, False, True]
    assert "prompt" in str(outputs[1].error)


def test_grad_mode_does_not_leak(tiny: Omni) -> None:
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    tiny.generate(
        [embeds(0), embeds(1)], [Params(num_inference_steps=n, output_type="latent") for n in (2, 5)], use_tqdm=False
    )
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_close_leaves_the_pipeline_as_it_was() -> None:
    pipeline = tiny_flux()
    before = pipeline(
        **embeds(0), **DEFAULTS, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    omni = Omni.from_pipe(pipeline, cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults=DEFAULTS)
    add(omni, "left", embeds(0), Params(num_inference_steps=50))
    omni.engine.step()
    omni.close()
    omni.close()
    with pytest.raises(EngineClosedError):
        omni.engine.add_request(OmniDiffusionRequest("x", "p", {"prompt": "p"}, Params()))
    after = pipeline(
        **embeds(0), **DEFAULTS, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    assert torch.equal(before, after)


def test_a_seed_makes_the_picture_of_plain_diffusers(demo: Omni) -> None:
    from vllm_omni.model_folder import generation_defaults

    pipeline = demo.engine.worker.pipeline
    plain = pipeline(
        "red apple",
        generator=torch.Generator("cpu").manual_seed(7),
        **generation_defaults("demo") | {"num_inference_steps": 6},
    ).images[0]
    ours = demo.generate("red apple", Params(seed=7, num_inference_steps=6, cache="off"), use_tqdm=False)[0]
    assert ours.seed == 7 and levels_apart(plain, ours.images[0]) == 0


@pytest.mark.parametrize(("kept", "bytes_", "decibels"), [("bfloat16", 1 / 2, 60.0), ("float8", 1 / 4, 52.0)])
def test_residuals_of_fewer_bits_save_memory_and_stay_close(
    demo: Omni, kept: str, bytes_: float, decibels: float
) -> None:
    """A half or a quarter of the memory of fp32, and pictures near those of the model's own dtype."""

    def run(omni: Omni) -> tuple[list[Any], int]:
        params = [Params(num_inference_steps=28, seed=i, cache={"nfe": 11, "predictor": "linear"}) for i in range(3)]
        store = next(iter(omni.engine.worker._backends.values())).store
        store.peak = 0
        outputs = omni.generate(DEMO_PROMPTS[:3], params, use_tqdm=False)
        assert [output.computed_steps for output in outputs] == [11] * 3 and store.used == 0
        return [np.asarray(output.images[0], dtype=float) for output in outputs], store.peak

    own, whole = run(demo)
    with Omni("demo", dtype="float32", cache_backend="magcache", cache_config={"residual_dtype": kept}) as omni:
        pictures, peak = run(omni)
    assert bytes_ <= peak / whole < bytes_ * 1.1
    errors = [((a - b) ** 2).mean() for a, b in zip(pictures, own, strict=True)]
    assert 10 * np.log10(255**2 / max(errors)) > decibels


@pytest.mark.slow
@pytest.mark.alone
@counted
def test_a_forward_reuses_the_memory_of_the_last_one() -> None:
    """In a process of ours; a library user's allocator stays as it is. Page faults of a batch of 16, run again."""
    ours, theirs = (faults(whose, {"model": "demo", "dtype": "float32"}, 16, 4) for whose in ("ours", "a user's"))
    assert ours < theirs / 4, (ours, theirs)  # 12,000
