"""Bad input: an `OmniError` that names field, value and fix, as early as possible; the engine goes on serving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from errors_raised import assert_matches
from pipelines import CURVE, DEFAULTS, embeds, tiny_flux

from vllm_omni.cache_names import OTHER_NAMES
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.cache.settings import engine_backend, override, parse
from vllm_omni.diffusion.data import DiffusionCacheConfig, OmniDiffusionConfig
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import InvalidValueError, ModelLoadError, OmniError, UnknownKeyError
from vllm_omni.inputs.data import MAX_PROMPT_CHARACTERS, OmniDiffusionSamplingParams

GOOD = {"num_inference_steps": 4, "seed": 0, "output_type": "latent"}


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults=DEFAULTS
    ) as engine:
        yield engine


def refused(omni: Omni, prompt: Any, params: dict[str, Any]) -> OmniError:
    """The error of one bad request between two good ones, whose pictures do not change."""
    prompts, parameters = [embeds(0), prompt, embeds(0)], [GOOD, {**GOOD, **params}, GOOD]
    good, bad, also_good = omni.generate(prompts, parameters, use_tqdm=False)
    assert good.ok and also_good.ok
    assert_close(good.latents, also_good.latents)  # two rows of one batch
    assert omni.engine.worker.cache_bytes == 0 and not omni.engine.has_unfinished_requests()
    assert isinstance(bad.error, OmniError) and not bad.images and bad.latents is None, bad.error
    return bad.error


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt must not be empty, got ''"),
        (" \n\t", "prompt must not be empty"),
        ("red\0apple", "prompt must not contain the NUL character"),
        ("x" * (MAX_PROMPT_CHARACTERS + 1), f"prompt must have at most {MAX_PROMPT_CHARACTERS}"),
        (None, "prompt must be a string or a dict"),
        (3, "prompt must be a string or a dict.*got 3"),
        ({}, "prompt must hold 'prompt' or 'prompt_embeds'"),
        ({"prompt": 7}, "prompt must be a string, got 7"),
        ({"prompt": "a", "negative_prompt": "b\0"}, "negative_prompt must not contain the NUL character"),
        ({"prompt": "a", "multi_modal_data": 1}, "multi_modal_data must be a dict"),
        ({**embeds(0), "promt_2": "x"}, "promt_2 is not an argument of FluxPipeline; did you mean 'prompt_2'"),
        ({**embeds(0), "num_frames": 3}, "num_frames"),
        ({**embeds(0), "generator": torch.Generator()}, "generator is a sampling parameter"),
        ({**embeds(0), "output_type": "np"}, "output_type is a sampling parameter"),
        ({**embeds(0), "return_dict": False}, "return_dict is the engine's own"),
        ({**embeds(0), "callback_on_step_end": print}, "callback_on_step_end is the engine's own"),
    ],
)
def test_a_bad_prompt_is_refused(omni: Omni, prompt: Any, message: str) -> None:
    assert_matches(refused(omni, prompt, {}), message)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps.*1.*got 0"),
        ({"num_inference_steps": -5}, "num_inference_steps.*1.*got -5"),
        ({"num_inference_steps": 10**9}, "num_inference_steps must be between 1 and 1000, got 1000000000"),
        ({"num_inference_steps": "many"}, "num_inference_steps.*got 'many'"),
        ({"num_inference_steps": 2.5}, "num_inference_steps.*got 2.5"),
        ({"height": 33}, r"height must be a multiple of \d+ \(nearest: 32\), got 33"),
        ({"width": 50001}, "width"),
        ({"height": 0}, "height.*got 0"),
        ({"width": -8}, "width.*got -8"),
        ({"height": 10**6, "width": 10**6}, "height x width must be at most .* pixels, got '1000000x1000000'"),
        ({"guidance_scale": math.nan}, "guidance_scale.*finite"),
        ({"guidance_scale": -1}, "guidance_scale.*got -1"),
        ({"seed": -1}, "seed.*got -1"),
        ({"seed": 2**64}, "seed"),
        ({"num_outputs_per_prompt": 0}, "num_outputs_per_prompt.*got 0"),
        ({"num_outputs_per_prompt": 10_000}, "num_outputs_per_prompt.*64"),
        ({"num_inference_step": 4}, "num_inference_step.*did you mean 'num_inference_steps'"),
        ({"num_frames": 9}, "num_frames is not an argument of FluxPipeline"),
        ({"fps": 1e9}, "fps"),
        ({"fps": "8"}, "fps"),
        ({"output_type": "bogus"}, "output_type"),
        ({"extra_args": {"guidance_scal": 1}}, "extra_args.*guidance_scal.*'guidance_scale'"),
        ({"extra_args": {"callback_on_step_end": print}}, "callback_on_step_end is the engine's own"),
        ({"extra_args": {"return_dict": False}}, "return_dict is the engine's own"),
        ({"extra_args": {"output_type": "np"}}, "output_type is a sampling parameter"),
        ({"extra_args": {"generator": torch.Generator()}}, "generator is a sampling parameter"),
        ({"generator": torch.Generator()}, "seed is not used with a generator, which has its own; give one, got 0"),
        ({"lora_scale": 0.5}, "lora_scale is not an argument of FluxPipeline; leave it out, got 0.5"),
        ({"extra_args": {"num_inference_steps": "many"}}, "num_inference_steps"),
        ({"extra_args": {"height": "tall"}}, "height"),
        ({"extra_args": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_args": 5}, "extra_args"),
        ({"lora_request": "x"}, "lora_request.*none is loaded"),
    ],
)
def test_bad_sampling_params_are_refused(omni: Omni, params: dict[str, Any], message: str) -> None:
    assert_matches(refused(omni, embeds(0), params), message)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("fsat", "cache must be one of 'off', .*'fast'.*, or a dict, got 'fsat'; did you mean 'fast'"),
        (5, "cache must be None, 'off', a preset's name or a dict"),
        ({"treshold": 0.1}, "cache has no 'treshold'; did you mean 'threshold'"),
        ({"mag_max_skip_step": 0.1}, "mag_max_skip_step.*did you mean.*'mag_max_skip_steps'"),
        ({"backend": "magcash"}, "^backend must be one of .*'magcache'.*got 'magcash'"),
        ({"backend": 5}, "^backend must be one of .*'magcache'.*got 5"),
        ({"backend": ""}, "^backend must be one of .*got ''"),
        ({"backend": ["magcache"]}, "^backend must be one of .*got .*magcache"),
        ({"enabled": 0}, "cache.enabled must be true or false.*got 0"),
        ({"enabled": "false"}, "cache.enabled must be true or false.*got 'false'"),
        ({5: 1}, "cache has no '5'"),
        ({"preset": "slow"}, "cache.preset must be one of .*'fast'.*got 'slow'"),
        ({"threshold": 0}, "threshold.*greater than 0, got 0"),
        ({"threshold": -0.1}, "threshold.*greater than 0"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": "big"}, "threshold.*got 'big'"),
        ({"max_skip_steps": 0}, "max_skip_steps.*1, got 0"),
        ({"max_skip_steps": 1.5}, "max_skip_steps.*got 1.5"),
        ({"retention_ratio": -0.1}, "retention_ratio.*0, got -0.1"),
        ({"retention_ratio": 1.0}, "retention_ratio.*1, got 1.0"),
        ({"mag_ratios": []}, "mag_ratios must not be empty"),
        ({"mag_ratios": [1.0, math.nan]}, r"mag_ratios\[1\] must be a finite number above 0, got nan"),
        ({"mag_ratios": [1.0, 0.0]}, r"mag_ratios\[1\] must be a finite number above 0, got 0.0"),
        ({"mag_ratios": [1.0, -2.0]}, r"mag_ratios\[1\] must be a finite number above 0, got -2.0"),
        ({"mag_ratios": "flux"}, "mag_ratios must be a list of numbers"),
        ({"steps_mask": []}, "steps_mask must begin with a computed step"),
        ({"steps_mask": [0, 1]}, "steps_mask must begin with a computed step"),
        ({"steps_mask": 5}, "steps_mask.*got 5"),
        ({"steps_mask": ["1", "2", "0"]}, "steps_mask must .*hold 0 and 1 alone"),
        ({"steps_mask": ["1", "no"]}, "steps_mask must be a flat list of flags, 0 or 1"),
        ({"steps_mask": torch.tensor(1)}, "steps_mask must be a flat list of flags"),
        ({"steps_mask": {"compute": 5}}, "steps_mask must hold lists of whole numbers"),
        ({"steps_mask": {"compute": [3], "skip": "2"}}, "steps_mask must hold lists of whole numbers"),
        ({"mag_ratios": [10**400]}, "mag_ratios must be a flat list of numbers of 1e-6 to 1e6"),
        ({"mag_ratios": torch.tensor(1.0)}, "mag_ratios must be a flat list of numbers"),
        ({"enable_taylorseer": []}, r"^enable_taylorseer must be one of False, True, got \[\]"),
        ({"sea_residual_order": {}}, r"^sea_residual_order must be one of 0, 1, got \{\}"),
        ({"Fn_compute_blocks": torch.ones(2)}, "^Fn_compute_blocks must be 1"),
        ({"preset": "fast", "mag_threshold": torch.ones(2)}, "mag_threshold should be a valid number"),
        ({"residual_diff_threshold": torch.ones(2)}, "^residual_diff_threshold should be a valid number"),
        ({"preset": torch.ones(2)}, "cache.preset must be one of"),
        ({"preset": ["fast"]}, "cache.preset must be one of"),
        ({"profile": "a" * 300}, "profile cannot be read .*give another file.*got 'aaa"),
        ({"profile": "a/" * 4000}, "profile cannot be read .*give another file.*got 'a/a"),
        ({"predictor": "taylor"}, "predictor.*'reuse'.*got 'taylor'"),
        ({"predictor": "affine"}, "predictor needs a calibrated profile.*got 'affine'"),
        ({"profile": "/no/such/profile.json"}, "profile must be a profile file, or a name such as 'demo'"),
        ({"memory_budget_mb": 1}, "memory_budget_mb"),
        ({"mag_calibrate": True}, "mag_calibrate"),
    ],
)
def test_bad_cache_settings_of_a_request_are_refused(omni: Omni, cache: Any, message: str) -> None:
    assert_matches(refused(omni, embeds(0), {"cache": cache}), message)


ODD = (
    None, -1, True, 0.5, math.nan, 10**400, "", "a" * 300, "\0", "\ud800", b"x", [], ["1", "0"], [None], [[1]],
    [10**400], {}, {"compute": 5}, {"skip": "a"}, {1: 2}, {1}, object(), torch.ones(2), torch.tensor(1.0), np.ones(2),
    np.bool_(1), iter([1]), 1 + 2j, len, "x/" * 3000,
)  # fmt: skip
KEYS = ("enabled", "backend", "threshold", *sorted(OTHER_NAMES), *DiffusionCacheConfig.model_fields, 5, None, ("a",))


@pytest.mark.parametrize("beside", [{}, {"preset": "fast"}, {"residual_diff_threshold": 0.1}, {"backend": "teacache"}])
def test_whatever_a_request_gives_as_its_cache_is_taken_or_refused_by_an_error_of_ours(beside: dict[str, Any]) -> None:
    for engine in (None, parse("magcache", DiffusionCacheConfig(nfe=5)), parse("teacache", DiffusionCacheConfig())):
        for asked in (*ODD, *({**beside, key: value} for key in KEYS for value in ODD)):
            with suppress(OmniError):
                override(asked, engine)


@pytest.mark.parametrize("word", ["none", "None", "off", "OFF"])
def test_a_word_for_no_cache_means_that_everywhere(omni: Omni, word: str) -> None:
    caches = [word, {"backend": word}, {"backend": word, "nfe": 3}, {"enabled": False}]
    outputs = omni.generate([embeds(0)] * 4, [{**GOOD, "cache": cache} for cache in caches], use_tqdm=False)
    for output in outputs:
        assert output.ok and output.cache_settings is None, output.error
    assert get_cache_backend(word) is None and engine_backend(word) == "none"
    with pytest.raises(InvalidValueError, match="needs a cache_backend"):
        OmniDiffusionConfig(model="demo", cache_backend=word, cache_config={"nfe": 5})


def test_a_bad_request_is_an_output_with_an_error(omni: Omni) -> None:
    (output,) = omni.generate("", use_tqdm=False)
    assert isinstance(output.error, InvalidValueError) and output.error.field == "prompt"
    assert omni.generate(embeds(1), GOOD, use_tqdm=False)[0].ok


def test_a_value_of_a_kind_that_nobody_expects_is_its_prompts_fault_alone(omni: Omni) -> None:
    prompts = [embeds(0), {**embeds(0), "sigmas": 5}, embeds(0)]
    seen: list[tuple[int, bool]] = []
    good, bad, also = omni.generate(
        prompts, GOOD, use_tqdm=False, on_output=lambda place, output: seen.append((place, output.ok))
    )
    assert good.ok and also.ok and isinstance(bad.error, TypeError)
    assert sorted(seen) == [(0, True), (1, False), (2, True)]
    assert seen[0] == (1, False)  # it is known before any step


def test_the_number_of_sampling_params_must_match_the_prompts(omni: Omni) -> None:
    with pytest.raises(InvalidValueError, match="sampling_params_list must have one per prompt, 2, got '1 entries'"):
        omni.generate([embeds(0), embeds(1)], [GOOD], use_tqdm=False)
    for odd in (5, ["steps"]):
        with pytest.raises(OmniError, match="sampling_params"):
            raise_error(omni, odd)
    assert omni.generate(embeds(0), GOOD, use_tqdm=False)[0].ok


def raise_error(omni: Omni, params: Any) -> None:
    """A refusal counts however it comes: raised, or in the output."""
    for output in omni.generate([embeds(0)], params, use_tqdm=False):
        if output.error is not None:
            raise output.error


def test_a_pipeline_without_a_text_encoder_fails_the_text_prompt_alone(omni: Omni) -> None:
    good, bad, also = omni.generate([embeds(0), "red apple", embeds(0)], GOOD, use_tqdm=False)
    assert good.ok and also.ok and bad.error is not None
    assert_close(good.latents, also.latents)
    assert omni.engine.worker.cache_bytes == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mag_threshold": 0}, "mag_threshold.*got 0"),
        ({"mag_threshold": math.inf}, "mag_threshold.*finite"),
        ({"mag_max_skip_steps": 0}, "mag_max_skip_steps.*got 0"),
        ({"mag_max_skip_steps": 10**9}, "mag_max_skip_steps.*10000"),
        ({"mag_retention_ratio": 1}, "mag_retention_ratio.*less than 1, got 1"),
        ({"mag_ratios": []}, "mag_ratios must not be empty"),
        ({"mag_ratios": [math.nan]}, r"mag_ratios\[0\] must be a finite number above 0, got nan"),
        ({"mag_ratios": ["a"]}, "mag_ratios must be a flat list of numbers"),
        ({"num_inference_steps": 0}, "num_inference_steps.*got 0"),
        ({"memory_budget_mb": -1}, "memory_budget_mb.*got -1"),
        ({"curve_resampling": "cubic"}, "curve_resampling.*'log'.*got 'cubic'"),
        ({"steps_mask": 5}, "steps_mask.*got 5"),
        ({"mag_calibrate": True, "calibrate": "auto"}, "calibrate learns while an engine serves.*give one of them"),
    ],
)
def test_a_bad_cache_config_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        DiffusionCacheConfig(**settings)
    with pytest.raises(InvalidValueError, match=message):
        Omni("/nonexistent", cache_backend="magcache", cache_config=settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model"),
        ({"model": ""}, "model.*got ''"),
        ({"model": 3}, "model.*got 3"),
        ({"model": "demo", "dtype": "int8"}, "dtype.*'bfloat16'.*got 'int8'"),
        ({"model": "demo", "max_num_seqs": 0}, "max_num_seqs.*got 0"),
        ({"model": "demo", "max_num_seq": 1}, "max_num_seq.*did you mean.*'max_num_seqs'"),
        ({"model": "demo", "cache_config": {}}, "cache_config needs a cache_backend"),
        ({"model": "demo", "cache_backend": "None", "cache_config": {"nfe": 5}}, "cache_config needs a cache_backend"),
        ({"model": "demo", "cache_backend": "Off", "cache_config": {"nfe": 5}}, "cache_config needs a cache_backend"),
        ({"model": "demo", "cache_backend": 5, "cache_config": {"nfe": 5}}, "cache_backend.*got 5"),
        ({"model": "demo", "cache_backend": "magcache", "cache_config": 5}, "DiffusionCacheConfig.*dict.*got 5"),
        ({"model": "demo", "cache_backend": "magcache", "cache_config": {"mag_calibrate": True}}, "mag_calibrate"),
        ({"model": "demo", "cache_backend": "magcache", "cache_config": {"mag_treshold": 1}}, "'mag_threshold'"),
    ],
)
def test_a_bad_engine_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        OmniDiffusionConfig(**arguments)


def test_valid_engine_arguments_are_accepted() -> None:
    assert OmniDiffusionConfig(model="demo", dtype=torch.bfloat16).dtype == "bfloat16"
    assert OmniDiffusionConfig(model="demo", dtype="half").dtype == "float16"
    assert isinstance(OmniDiffusionSamplingParams(num_inference_steps=1).num_inference_steps, int)


@pytest.mark.parametrize("name", ["magcash", "teecache", "", 7])
def test_a_wrong_cache_name_fails_before_any_weight_loads(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.diffusion.worker.worker.load_pipeline", lambda config: pytest.fail("loaded"))
    for model in ("/nonexistent", "demo"):
        with pytest.raises(OmniError, match=r"cache_backend.*got") as caught:
            Omni(model, cache_backend=name)
        if name == "magcash":
            assert "'magcache'" in str(caught.value) and "'magcash'" in str(caught.value)


def test_a_checkpoint_without_a_curve_is_refused_at_start_up() -> None:
    pipeline = tiny_flux()
    with pytest.raises(InvalidValueError, match=r"mag_ratios must be given.*calibrate"):
        Omni.from_pipe(pipeline, cache_backend="magcache")
    with Omni.from_pipe(pipeline, defaults=DEFAULTS) as plain:
        bad = plain.generate(embeds(0), {**GOOD, "cache": "fast"}, use_tqdm=False)[0]
        assert isinstance(bad.error, InvalidValueError) and "mag_ratios" in str(bad.error)
        with_curve = {**GOOD, "num_inference_steps": 10, "cache": {"mag_ratios": list(CURVE)}}
        good = plain.generate(embeds(0), with_curve, use_tqdm=False)[0]
        assert good.ok and good.skipped_steps > 0


def test_a_predictor_without_its_data_is_refused_at_start_up() -> None:
    config = {"mag_ratios": CURVE, "predictor": "affine"}
    with pytest.raises(InvalidValueError, match=r"predictor needs a calibrated profile.*got 'affine'"):
        Omni.from_pipe(tiny_flux(), cache_backend="magcache", cache_config=config)


def test_a_request_with_a_plan_in_the_place_of_the_mask_needs_a_curve() -> None:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"steps_mask": [1, 0]}, defaults=DEFAULTS
    ) as omni:
        assert_matches(refused(omni, embeds(0), {"cache": {"preset": "auto"}}), "mag_ratios must be given")


def test_all_errors_derive_from_one_class() -> None:
    for kind in (InvalidValueError, UnknownKeyError, ModelLoadError):
        assert issubclass(kind, OmniError) and issubclass(kind, ValueError)
