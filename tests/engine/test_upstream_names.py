"""Names that users of upstream, of cache-dit and of SeaCache type: each means what it says, or says what to give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from adapters import save_adapter
from pipelines import CURVE, DEFAULTS, DEMO, embeds, run_latents, tiny_flux
from waiting import until

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.cache.settings import override, parse
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import EngineClosedError, EngineDeadError, InvalidValueError, OmniError, RequestAbortedError
from vllm_omni.outputs import OmniRequestOutput

FEW = {"num_inference_steps": 4, "seed": 1, "output_type": "latent"}

# ------------------------------------------------------------------------------------------------------- cache settings


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"residual_diff_threshold": 0.2}, {"rel_l1_thresh": 0.2}),
        ({"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_cached_steps": -1}, {}),
        ({"max_continuous_cached_steps": 3, "scm_steps_mask_policy": None}, {"mag_max_skip_steps": 3}),
        ({"enable_taylorseer": True, "taylorseer_order": 1}, {"predictor": "linear"}),
        ({"enable_taylorseer": False}, {"predictor": "reuse"}),
        ({"max_warmup_steps": 4, "num_inference_steps": 20}, {"mag_retention_ratio": 0.2, "num_inference_steps": 20}),
        ({"sea_threshold": 0.3, "sea_max_consecutive_cached": 2}, {"rel_l1_thresh": 0.3, "mag_max_skip_steps": 2}),
        ({"sea_residual_order": 1}, {"predictor": "linear"}),
        ({"sea_threshold": 0.3, "rel_l1_thresh": 0.3}, {"rel_l1_thresh": 0.3}),
    ],
)
def test_settings_of_other_caches_mean_the_same(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert DiffusionCacheConfig(**theirs) == DiffusionCacheConfig(**ours) == DiffusionCacheConfig.from_dict(theirs)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"Fn_compute_blocks": 8}, "Fn_compute_blocks must be 1"),
        ({"Bn_compute_blocks": 8}, "Bn_compute_blocks must be 0"),
        ({"taylorseer_order": 2}, "taylorseer_order must be 1"),
        ({"scm_steps_mask_policy": "medium"}, "is steps_mask here"),
        ({"max_warmup_steps": 4}, "give a larger num_inference_steps"),
        ({"max_warmup_steps": 4, "num_inference_steps": 4}, "give a larger num_inference_steps"),
        ({"sea_threshold": 0.3, "rel_l1_thresh": 0.2}, "sea_threshold says what rel_l1_thresh says"),
        ({"sea_power_exp": 3.0}, "leave it out"),
        ({"sea_residual_order": 2}, "must be one of 0, 1"),
        ({"residual_diff_threshold": -1}, "residual_diff_threshold should be"),
        ({"residual_diff_treshold": 1}, "has no 'residual_diff_treshold'"),
    ],
)
def test_what_is_not_done_here_says_what_is(theirs: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidValueError) as refused:
        DiffusionCacheConfig(**theirs)
    assert told in str(refused.value)


WRONG = {"residual_diff_threshold": -1, "sea_threshold": "x", "max_continuous_cached_steps": 0,
         "sea_max_consecutive_cached": -2, "sea_residual_order": 3, "max_warmup_steps": -1}  # fmt: skip


@pytest.mark.parametrize("name", [*WRONG, "threshold", "max_skip_steps", "retention_ratio"])
def test_an_error_has_the_name_that_was_typed(name: str) -> None:
    """In a request too, where our own settings have shorter names."""
    given = {name: WRONG.get(name, -1)}
    for backend in ("magcache", "fbcache"):
        with pytest.raises(InvalidValueError) as refused:
            override(given | {"backend": backend}, None)
        assert refused.value.field == name and str(refused.value).startswith(name)
    if name in WRONG:
        with pytest.raises(InvalidValueError) as refused:
            DiffusionCacheConfig.from_dict(given)
        assert refused.value.field == name


def test_a_request_takes_their_names() -> None:
    engine = parse("fbcache", DiffusionCacheConfig(rel_l1_thresh=0.1, mag_max_skip_steps=2))
    theirs = {"residual_diff_threshold": 0.2, "max_continuous_cached_steps": 3}
    assert override(theirs, engine) == override({"rel_l1_thresh": 0.2, "mag_max_skip_steps": 3}, engine)
    with pytest.raises(InvalidValueError, match="residual_diff_threshold is a gate's setting"):
        override(theirs, parse("magcache", DiffusionCacheConfig()))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sea_cache", {"sea_threshold": 0.6, "sea_max_consecutive_cached": 2}),
        ("fbcache", {"residual_diff_threshold": 0.6, "Fn_compute_blocks": 1, "max_continuous_cached_steps": 2}),
    ],
)
def test_they_skip_under_their_own_names(name: str, config: dict[str, Any]) -> None:
    pipe = tiny_flux()
    backend: Any = get_cache_backend(name, config)
    backend.enable(pipe)
    run_latents(pipe, num_inference_steps=20)
    assert backend.last_request.skipped_steps > 0
    backend.disable(pipe)


# ----------------------------------------------------------------------------------------------- parameters and outputs


def test_parameters_are_made_and_copied() -> None:
    params = Params(seed=3, sigmas=[1.0, 0.5], extra_args={"a": [1]}, latents=torch.zeros(2))
    twin = params.clone()
    assert twin is not params and twin.seed == 3 and twin.sigmas == params.sigmas
    twin.extra_args["a"].append(2)
    twin.latents.add_(1)
    assert params.extra_args == {"a": [1]} and not params.latents.any()
    assert Params.from_params(params) is params and Params.from_params({"seed": 4}).seed == 4
    theirs = SimpleNamespace(seed=5, extra_args={"num_inference_steps": 7}, temperature=0.0)
    assert Params.from_params(theirs) == Params(seed=5, num_inference_steps=7)
    several = SimpleNamespace(seed=None, n=4, extra_args={"seed": 3, "num_inference_steps": 7})
    assert Params.from_params(several) == Params(seed=3, num_outputs_per_prompt=4, num_inference_steps=7)
    assert Params.from_params(SimpleNamespace(seed=3, n=1, extra_args={"seed": 3})) == Params(seed=3)
    with pytest.raises(InvalidValueError, match="seed is 3 outside extra_args; give it once, got 4"):
        Params.from_params(SimpleNamespace(seed=3, n=1, extra_args={"seed": 4}))
    with pytest.raises(InvalidValueError, match="sampling_params must be sampling parameters"):
        Params.from_params(5)
    assert Params(lora_scale=0.5, lora_request=["a", ("b", 0.5)]).lora_request == (("a", 0.5), ("b", 0.25))
    assert Params(lora_scale=1.0) == Params() and Params(lora_scale=0, lora_request="a").lora_request == ()
    scaled = Params(lora_scale=0.5, lora_request="a")
    assert Params(**dict(scaled)).lora_request == scaled.lora_request == (("a", 0.5),)  # once, however often it crosses


def test_noise_levels_come_from_arrays_and_tensors() -> None:
    levels = [1.0, 0.75, 0.5, 0.25]
    for given in (np.linspace(1, 0.25, 4), torch.tensor(levels), levels):
        assert Params(sigmas=given).sigmas == Params(timesteps=given).timesteps == levels
    for wrong in (torch.tensor(1.0), np.array(["a"])):
        with pytest.raises(InvalidValueError, match="sigmas"):
            Params(sigmas=wrong)
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        given = [Params(**FEW, sigmas=sigmas) for sigmas in (levels, np.array(levels))]
        listed, array = omni.generate([embeds(0)] * 2, given, use_tqdm=False)
    assert listed.ok and torch.equal(array.latents, listed.latents)


def test_a_model_is_named_by_a_path() -> None:
    with Omni(Path(DEMO)) as omni:
        assert omni.generate("red apple", Params(**FEW), use_tqdm=False)[0].ok


def test_omni_takes_vllms_parameters() -> None:
    theirs = SimpleNamespace(seed=1, n=2, extra_args=FEW)
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        two, one = omni.generate([embeds(0)] * 2, [theirs, FEW], use_tqdm=False)
        assert two.ok and one.ok and (len(two.latents), len(one.latents)) == (2, 1)
        assert isinstance(omni.generate(embeds(0), 5, use_tqdm=False)[0].error, InvalidValueError)


def test_parameters_of_other_pipelines_ask_for_nothing_at_upstreams_defaults() -> None:
    neutral = {"guidance_rescale": 0.0, "cfg_normalize": False, "use_en_prompt": False, "eta": 0.0}
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        plain, same = omni.generate([embeds(0)] * 2, [Params(**FEW), Params(**FEW, **neutral)], use_tqdm=False)
        assert same.ok and torch.equal(same.latents, plain.latents)
        for name, value in {"guidance_rescale": 0.7, "frame_rate": 24.0, "layers": 4, "use_en_prompt": True}.items():
            refused = omni.generate(embeds(0), Params(**FEW, **{name: value}), use_tqdm=False)[0]
            assert isinstance(refused.error, InvalidValueError) and refused.error.field == name


def test_a_request_of_vllm_for_an_adapter_names_it() -> None:
    theirs = SimpleNamespace(lora_name="ink", lora_int_id=1, lora_path="/adapters/ink")
    assert Params(lora_request=theirs).lora_request == (("ink", 1.0),)
    assert Params(lora_request=[theirs], lora_scale=0.5).lora_request == (("ink", 0.5),)


def test_an_output_tells_what_it_is() -> None:
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:

        def made(**more: Any) -> OmniRequestOutput:
            return omni.generate(embeds(0), Params(**FEW | more), use_tqdm=False)[0]

        latents, picture, plain = made(), made(output_type="pil"), made(eta=0.0, generator_device="cpu")
        assert torch.equal(latents.latents, plain.latents)
        assert (latents.final_output_type, picture.final_output_type) == ("latents", "image")
        assert (picture.num_images, picture.error_type) == (1, None)
        told = picture.to_dict()
        assert told["images"] == picture.images and told["num_images"] == 1 and told["error"] is None
        for wrong, name in (({"resolution": 64}, "resolution"), ({"generator_device": "moon"}, "generator_device")):
            failed = made(**wrong)
            assert failed.error_type == "InvalidValueError" and name in failed.to_dict()["error"]
            assert failed.final_output_type == "none"


# ------------------------------------------------------------------------------------------------------------ AsyncOmni


@pytest_asyncio.fixture
async def omni() -> AsyncIterator[AsyncOmni]:
    async with AsyncOmni.from_pipe(tiny_flux(), defaults=DEFAULTS) as engine:
        yield engine


async def final(omni: AsyncOmni, *args: Any, **kwargs: Any) -> OmniRequestOutput:
    outputs = [output async for output in omni.generate(embeds(0), *args, **kwargs)]
    assert outputs[-1].finished
    return outputs[-1]


async def test_generate_takes_what_upstream_takes(omni: AsyncOmni, tmp_path: Path) -> None:
    params = Params(**FEW)
    wanted = (await final(omni, params)).latents
    for asked in ({"sampling_params_list": [params]}, {"sampling_params_list": params, "output_modalities": ["image"]}):
        assert torch.equal((await final(omni, **asked)).latents, wanted)
    save_adapter(tiny_flux(), tmp_path / "ink", 0)
    assert await omni.add_lora("ink", str(tmp_path / "ink")) and await omni.list_loras() == {"ink"}
    inked = (await final(omni, params, lora_request="ink")).latents
    assert not torch.equal(inked, wanted)
    assert torch.equal((await final(omni, Params(**FEW, lora_request="ink"))).latents, inked)
    half = (await final(omni, Params(**FEW, lora_request=[("ink", 0.5)]))).latents
    assert torch.equal((await final(omni, Params(**FEW, lora_scale=0.5), lora_request="ink")).latents, half)
    assert not torch.equal(half, inked)
    assert len((await final(omni, SimpleNamespace(seed=1, n=2, extra_args=FEW))).latents) == 2
    assert await omni.remove_lora("ink") and await omni.list_loras() == set()
    for wrong, name in (
        ({"sampling_params_list": [params, params]}, "sampling_params_list"),
        ({"sampling_params": params, "sampling_params_list": [params]}, "sampling_params_list"),
        ({"output_modalities": ["text"]}, "output_modalities"),
        ({"sampling_params": 5}, "sampling_params must be"),
        ({"sampling_params": Params(lora_request="ink"), "lora_request": "ink"}, "lora_request"),
    ):
        with pytest.raises(OmniError, match=name):
            await final(omni, **wrong)


@pytest.mark.parametrize("wait", [True, False])
async def test_generation_is_paused_and_resumed(omni: AsyncOmni, wait: bool) -> None:
    wanted = (await final(omni, Params(**FEW))).latents
    steps = 200 if wait else 1000  # more than are taken before it is aborted
    running = asyncio.create_task(final(omni, Params(**FEW | {"num_inference_steps": steps})))
    await asyncio.to_thread(until, omni.engine.has_unfinished_requests, pause_s=0.001)
    await omni.pause_generation(wait_for_inflight_requests=wait)
    assert await omni.is_paused() and not omni.engine.has_unfinished_requests()
    ended = await running
    assert ended.ok if wait else isinstance(ended.error, RequestAbortedError)
    later = asyncio.create_task(final(omni, Params(**FEW)))
    await asyncio.sleep(0.2)
    assert not later.done()
    await omni.resume_generation()
    assert torch.equal((await asyncio.wait_for(later, 20)).latents, wanted) and not await omni.is_paused()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_health_is_that_of_the_thread() -> None:
    omni = AsyncOmni.from_pipe(tiny_flux(), defaults=DEFAULTS, cache_backend="magcache",
                               cache_config={"mag_ratios": CURVE})  # fmt: skip
    await omni.check_health()
    omni.close()
    with pytest.raises(EngineClosedError):
        await omni.check_health()
    dead = AsyncOmni.from_pipe(tiny_flux(), defaults=DEFAULTS)

    def broken() -> Any:
        raise SystemExit

    dead.engine.step = broken  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError):
        await final(dead, Params(**FEW))
    dead._thread.join(10)
    with pytest.raises(EngineDeadError):
        await dead.check_health()
