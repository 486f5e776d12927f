"""Text encoders and VAEs of several requests in one call: equal results, and a fault or an abort of one is its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from closeness import assert_close, assert_differs, levels_apart
from peft import LoraConfig
from pipelines import DEFAULTS, embeds, tiny_flux
from stepping import add, drain
from transformers.modeling_outputs import BaseModelOutputWithPast

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.worker import components
from vllm_omni.diffusion.worker.components import call_component, component_key
from vllm_omni.diffusion.worker.coroutine import ComponentCall, DecoderProxy
from vllm_omni.errors import RequestAbortedError

PROMPTS = ["red apple", "penguin", "rocket", "banana"]


@pytest.fixture(scope="module")
def demo() -> Iterator[Omni]:
    """The demo model, whose text encoders run for every request: that is what is counted here."""
    with Omni("demo", dtype="float32", cache_backend="magcache", prompt_cache_mb=0) as omni:
        yield omni


@pytest.fixture
def calls(demo: Omni) -> Iterator[dict[str, list[int]]]:
    """Rows of each call of the demo's text encoders and decoder."""
    pipeline, counted = demo.engine.worker.pipeline, {"text_encoder": [], "text_encoder_2": [], "vae": []}
    handles = []
    for name, rows in counted.items():
        module = getattr(pipeline, name)
        module = module.decoder if name == "vae" else module

        def note(module: Any, args: Any, kwargs: Any, rows: list[int] = rows) -> None:
            rows.append(len(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    yield counted
    for handle in handles:
        handle.remove()


def test_simultaneous_requests_are_encoded_and_decoded_in_joint_calls(demo: Omni, calls: dict[str, list[int]]) -> None:
    params = [Params(num_inference_steps=6, seed=i, num_outputs_per_prompt=1 + i % 2) for i in range(4)]
    together = demo.generate(PROMPTS, params, use_tqdm=False)
    assert calls == {"text_encoder": [4], "text_encoder_2": [4], "vae": [6]}
    for rows in calls.values():
        rows.clear()
    for prompt, one, own in zip(PROMPTS, params, together, strict=True):
        alone = demo.generate(prompt, one, use_tqdm=False)[0]
        assert own.ok and len(own.images) == len(alone.images)
        assert max(levels_apart(a, b) for a, b in zip(own.images, alone.images, strict=True)) <= 1
    assert calls == {"text_encoder": [1] * 4, "text_encoder_2": [1] * 4, "vae": [1, 2, 1, 2]}


def test_a_joint_decode_is_limited_in_size(
    demo: Omni, calls: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = demo.generate("x", Params(num_inference_steps=1, output_type="latent"), use_tqdm=False)[0].latents.shape
    monkeypatch.setattr(components, "MOST_JOINED", 3 * shape.numel() + 1)
    outputs = demo.generate(PROMPTS, Params(num_inference_steps=2, seed=0), use_tqdm=False)
    assert all(output.ok for output in outputs) and calls["vae"] == [3, 1]


def test_a_turn_has_one_decode(demo: Omni, calls: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests end together: between two of them others go on, and aborts and deadlines are seen."""
    monkeypatch.setattr(components, "MOST_JOINED", 1)
    for name, prompt in zip("abcd", PROMPTS, strict=True):
        add(demo, name, prompt, Params(num_inference_steps=2, seed=0))
    seen, outputs = [0], {}
    while demo.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in demo.engine.step()}
        seen.append(len(calls["vae"]))
    assert max(b - a for a, b in pairwise(seen)) == 1 and seen[-1] == 4
    assert all(output.ok for output in outputs.values())


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_a_fault_in_a_joint_call_fails_only_its_own_request(demo: Omni, part: str) -> None:
    pipeline = demo.engine.worker.pipeline
    tokens = pipeline.tokenizer_2 if part == "text_encoder_2" else pipeline.tokenizer
    poison = tokens("rocket")["input_ids"][-2]

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        value = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        if (value == poison).any() if part != "vae" else (value.abs() > 50).any():
            raise ArithmeticError("poisoned")

    module = getattr(pipeline, part)
    module = module.post_quant_conv or module.decoder if part == "vae" else module
    handle = module.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        huge = torch.full((1, 64, 16), 1e3) if part == "vae" else None
        latents = [None, None, huge, None]
        params = [Params(num_inference_steps=4, seed=i, latents=at) for i, at in enumerate(latents)]
        outputs = demo.generate(PROMPTS, params, use_tqdm=False)
    finally:
        handle.remove()
    assert isinstance(outputs[2].error, ArithmeticError), outputs[2].error
    for i in (0, 1, 3):
        alone = demo.generate(PROMPTS[i], params[i], use_tqdm=False)[0]
        assert outputs[i].ok and levels_apart(outputs[i].images[0], alone.images[0]) <= 1
    assert not demo.engine.has_unfinished_requests() and demo.engine.worker.cache_bytes == 0


def test_a_request_can_be_aborted_while_it_is_encoded_or_decoded(demo: Omni) -> None:
    seen = []
    for stage in ("encode", "decode"):
        for name, prompt in zip("ab", PROMPTS, strict=False):
            add(demo, name, prompt, Params(num_inference_steps=3, seed=1))
        outputs: dict[str, Any] = {}
        while demo.engine.stage("a") != stage:
            outputs |= {output.request_id: output for output in demo.engine.step()}
        assert demo.engine.stage("b") == stage
        seen.append(demo.engine.stage("a"))
        running = demo.engine._entries["a"].running
        assert running is not None and running.parked is not None
        assert not running.parked.arguments and running.parked.forecast is None  # decoding needs the room
        demo.engine.abort(["a"])
        drain(demo, outputs)
        assert isinstance(outputs["a"].error, RequestAbortedError) and outputs["b"].ok
        alone = demo.generate(PROMPTS[1], Params(num_inference_steps=3, seed=1), use_tqdm=False)[0]
        assert levels_apart(outputs["b"].images[0], alone.images[0]) <= 1
    assert seen == ["encode", "decode"]


def test_encode_and_decode_seconds_are_reported(demo: Omni) -> None:
    outputs = demo.generate(PROMPTS, Params(num_inference_steps=3, seed=1), use_tqdm=False)
    told = [output.stage_durations for output in outputs]
    assert all(one["decode_s"] > 0 and one["encode_and_denoise_s"] > 0 for one in told)
    assert sum(one["decode_s"] for one in told) < outputs[0].metrics["total_s"]  # of a joint call, a share each


def test_adapters_of_a_text_encoder_apply_only_to_their_own_request() -> None:
    """Pipelines set the scale before the call and take it back after it."""
    with Omni("demo", dtype="float32") as omni:
        encoder = omni.engine.worker.pipeline.text_encoder
        torch.manual_seed(0)
        encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        less = {"joint_attention_kwargs": {"scale": 0.25}}
        params = [
            Params(num_inference_steps=3, seed=1, extra_args=extra, output_type="latent") for extra in (less, {}, less)
        ]
        together = omni.generate(["penguin"] * 3, params, use_tqdm=False)
        alone = [omni.generate("penguin", one, use_tqdm=False)[0].latents for one in params]
        assert_differs(alone[0], alone[1])
        for own, one in zip(together, alone, strict=True):
            assert_close(own.latents, one)


def test_a_decoder_that_its_pipeline_casts_is_called_directly() -> None:
    """SDXL's pipelines cast the shared VAE before the call and back after it."""
    parked: list[ComponentCall] = []
    vae = tiny_flux().vae
    proxy: Any = DecoderProxy("vae", vae, parked.append)
    latents = torch.randn(1, vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        proxy.decode(latents, return_dict=False)
        assert [call.method for call in parked] == ["decode"]
        assert proxy.to(dtype=torch.float64) is proxy and vae.dtype == torch.float64
        (picture,) = proxy.decode(latents.double(), return_dict=False)
    assert picture.dtype == torch.float64 and len(parked) == 1


def test_only_compatible_calls_are_joined() -> None:
    def call(*args: Any, **kwargs: Any) -> ComponentCall:
        return ComponentCall("vae", "decode", args, kwargs)

    one, row = torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    key = component_key(call(one, return_dict=False))
    assert key is not None and key == component_key(call(row, return_dict=False))
    others = [call(one), call(one, return_dict=True), call(one.half(), return_dict=False),
              call(torch.zeros(1, 4, 8, 9), return_dict=False), call(one, return_dict=False, timestep=one)]  # fmt: skip
    assert len({component_key(other) for other in others} | {key}) == 6
    assert component_key(call(one, generator=torch.Generator())) is None
    assert component_key(call(one, torch.zeros(3))) is None and component_key(call(one, torch.zeros(()))) is None
    assert component_key(call(prompt="x")) is None


def test_a_language_models_kv_cache_is_not_split_into_rows() -> None:
    ids = [torch.tensor([[1, 2]]), torch.tensor([[3, 4], [5, 6]])]
    seen = []

    def encoder(input_ids: torch.Tensor, use_cache: bool) -> BaseModelOutputWithPast:
        seen.append(len(input_ids))
        return BaseModelOutputWithPast(
            last_hidden_state=input_ids * 10, past_key_values=object(), hidden_states=(input_ids, input_ids + 1)
        )

    calls = [ComponentCall("text_encoder", "__call__", (each,), {"use_cache": True}) for each in ids]
    assert component_key(calls[0]) == component_key(calls[1])
    for each, output in zip(ids, call_component(encoder, calls), strict=True):
        assert torch.equal(output.last_hidden_state, each * 10) and torch.equal(output.hidden_states[1], each + 1)
        assert output.past_key_values is None
        assert output.last_hidden_state.untyped_storage().nbytes() == each.nbytes  # it keeps nobody else's alive
    assert seen == [3]
    with pytest.raises(TypeError, match="3 rows"):
        call_component(lambda input_ids, use_cache: torch.zeros(1), calls)


def test_pictures_of_two_sizes_are_decoded_apart() -> None:
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS) as omni:
        params = [Params(num_inference_steps=3, seed=i, height=side, width=side) for i, side in enumerate((32, 48, 32))]
        together = omni.generate([embeds(i) for i in range(3)], params, use_tqdm=False)
        for i, one in enumerate(params):
            alone = omni.generate(embeds(i), one, use_tqdm=False)[0]
            assert together[i].images[0].size == (one.width, one.height)
            assert levels_apart(together[i].images[0], alone.images[0]) <= 1
