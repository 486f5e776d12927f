"""Options of loading that diffusers carries out: weights in 8 bits, attention kernels, offloaded blocks."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import levels_apart
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import AutoencoderMixin
from paths import DEMO

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion import loader
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import load_pipeline, prepare
from vllm_omni.entrypoints.omni import WHILE_LOADING
from vllm_omni.errors import InvalidValueError, UnknownChoiceError
from vllm_omni.model_folder import generation_defaults

FEW = Params(num_inference_steps=6, seed=1)


def test_weights_in_8_bits_are_those_of_diffusers(demo: Omni) -> None:
    plain = DiffusionPipeline.from_pretrained(DEMO, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    asked = generation_defaults("demo") | {"num_inference_steps": 6}
    wanted = plain("red apple", generator=torch.Generator().manual_seed(1), **asked)
    with Omni("demo", dtype="float32", quantization="fp8") as omni:
        weights = [p.dtype for p in omni.engine.worker.pipeline.transformer.parameters()]
        assert weights.count(torch.float8_e4m3fn) > len(weights) / 2
        got = omni.generate("red apple", FEW, use_tqdm=False)[0]
        assert levels_apart(got.images[0], wanted.images[0]) <= 1
        omni.sleep(2)
        omni.wake_up()
        again = omni.generate("red apple", FEW, use_tqdm=False)[0]
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(got.images[0]))
    bare = demo.generate("red apple", Params(num_inference_steps=6, seed=1, cache="off"), use_tqdm=False)[0]
    assert levels_apart(got.images[0], bare.images[0]) > 1


def test_8_bits_and_a_cache_go_together() -> None:
    """The fingerprint of a checkpoint is that of its own weights: in 8 bits its profile is chosen by name."""
    with pytest.raises(InvalidValueError, match="profile by name: demo"):
        Omni("demo", quantization="fp8", cache_backend="magcache")
    known = {"profile": "demo", "profile_insist": True}
    with Omni("demo", quantization="fp8", cache_backend="magcache", cache_config=known) as omni:
        made = omni.generate("red apple", Params(seed=1, num_inference_steps=20), use_tqdm=False)[0]
        assert made.ok and made.skipped_steps > 0


def test_an_attention_kernel_is_chosen_by_diffusers_name(demo: Omni) -> None:
    with Omni("demo", dtype="float32", attention_backend="_native_math") as omni:
        processors = omni.engine.worker.pipeline.transformer.attn_processors.values()
        assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
        got = omni.generate("red apple", FEW, use_tqdm=False)[0]
    bare = demo.generate("red apple", Params(num_inference_steps=6, seed=1, cache="off"), use_tqdm=False)[0]
    assert levels_apart(got.images[0], bare.images[0]) <= 1


def test_offloaded_blocks_make_the_same_picture(demo: Omni) -> None:
    """On a CPU nothing moves, but the hooks are those that a GPU has; blocks are exchanged and skipped under them."""
    config = OmniDiffusionConfig(model="demo", dtype="float32")
    pipeline = load_pipeline(config)
    prepare(pipeline, config.model_copy(update={"enable_layerwise_offload": True}), "cpu", torch.float32)
    with Omni.from_pipe(pipeline, defaults=generation_defaults("demo"), cache_backend="magcache") as omni:
        asked = Params(num_inference_steps=20, seed=1)
        got = omni.generate("red apple", asked, use_tqdm=False)[0]
        wanted = demo.generate("red apple", asked, use_tqdm=False)[0]
    assert got.skipped_steps == wanted.skipped_steps > 0
    assert levels_apart(got.images[0], wanted.images[0]) <= 1


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    for given, kind, told in [
        ({"quantization": "fp4"}, UnknownChoiceError, "fp8"),
        ({"attention_backend": "nativ"}, InvalidValueError, "native"),
        ({"enable_layerwise_offload": True}, InvalidValueError, "accelerator"),
        ({"enable_layerwise_offload": True, "enable_cpu_offload": True}, InvalidValueError, "give one"),
        ({"max_loras": 0}, InvalidValueError, "max_loras"),
    ]:
        with pytest.raises(kind, match=told):
            Omni("demo", device="cpu", **given)


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"dtype": "bfloat16"}, r"pipe\.to\(dtype\)"),
        ({"device": "cuda"}, r"pipe\.to\(device\)"),
        ({"device": "cpu:1"}, r"pipe\.to\(device\)"),
        ({"revision": "main"}, "from_pretrained"),
        ({"enforce_eager": False}, "compile_repeated_blocks"),
        ({"enable_cpu_offload": True}, "enable_model_cpu_offload"),
        ({"enable_layerwise_offload": True}, "enable_group_offload"),
        ({"quantization": "fp8"}, "enable_layerwise_casting"),
        ({"attention_backend": "nonsense"}, "set_attention_backend"),
        ({"vae_use_slicing": True}, "enable_slicing"),
        ({"vae_use_tiling": True}, "enable_tiling"),
    ],
)
@pytest.mark.parametrize("kind", [Omni, AsyncOmni])
def test_a_loaded_pipeline_is_not_given_options_of_loading(kind: Any, given: dict[str, Any], instead: str) -> None:
    from pipelines import DEFAULTS, tiny_flux

    with pytest.raises(InvalidValueError, match=f"{next(iter(given))} is applied while .*{instead}"):
        kind.from_pipe(tiny_flux(), defaults=DEFAULTS, **given)


def test_options_of_loading_that_a_pipeline_meets_are_taken() -> None:
    from pipelines import DEFAULTS, tiny_flux

    Omni.from_pipe(tiny_flux(), defaults=DEFAULTS, dtype="float32", device="cpu", enforce_eager=True).close()


def test_every_option_that_the_loader_applies_is_known_to_from_pipe() -> None:
    source = inspect.getsource(loader)
    read = {name for name in OmniDiffusionConfig.model_fields if re.search(rf"\b{name}\b", source)}
    assert read - {"model", "parallel_config"} == set(WHILE_LOADING)


class Whole(AutoencoderMixin, torch.nn.Module):
    """A decoder of diffusers' that knows neither tiles nor slices."""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"vae_use_tiling": True}, "(enable_tiling|Tiling)"),
        ({"vae_use_slicing": True}, "(enable_slicing|Slicing)"),
        ({"quantization": "fp8"}, "enable_layerwise_casting"),
        ({"attention_backend": "native"}, "set_attention_backend"),
        ({"enforce_eager": False}, "compile_repeated_blocks"),
    ],
)
def test_an_option_that_a_model_cannot_have_is_named(
    given: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import tiny_flux

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = pipe.transformer.config

    for vae in (None, torch.nn.Linear(1, 1), Whole()):
        pipe = tiny_flux()
        pipe.transformer = Own()
        pipe.vae = vae
        monkeypatch.setattr(loader, "_pipeline", lambda *given, pipe=pipe: pipe)
        with pytest.raises(InvalidValueError, match=f"cannot be used with this model, leave it out.*{told}") as refused:
            load_pipeline(OmniDiffusionConfig(model="demo", device="cpu", **given))
        assert {refused.value.field: refused.value.value} == given


def test_a_pipeline_that_was_given_sleeps_at_level_1_alone(tmp_path: Path) -> None:
    from pipelines import DEFAULTS, embeds, tiny_flux

    from vllm_omni.errors import ConflictError, EngineAsleepError, EngineClosedError

    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        with pytest.raises(ConflictError, match="level 1"):
            omni.sleep(2)
        assert not omni.is_sleeping
        omni.sleep()
        assert omni.is_sleeping
        assert isinstance(omni.generate(embeds(), use_tqdm=False)[0].error, EngineAsleepError)
        omni.wake_up()
        assert omni.generate(embeds(), FEW, use_tqdm=False)[0].ok
    with pytest.raises(EngineClosedError):
        omni.sleep()
