"""Text encoders and decoder in threads of their own: the same pictures, and the batch goes on meanwhile."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_close
from pipelines import DEFAULTS, tiny_flux
from stepping import add, drain

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidValueError, OmniError, RequestAbortedError
from vllm_omni.kernels.beside import Elsewhere

PROMPTS = ["red apple", "penguin", "rocket", "banana"]
ELSEWHERE: dict[str, Any] = {"text_encoder_device": "cpu", "vae_device": "cpu"}
SHORT = Params(num_inference_steps=2, seed=1)


@pytest.fixture(scope="module")
def demo() -> Iterator[Omni]:
    with Omni("demo", dtype="float32", cache_backend="magcache", prompt_cache_mb=0, **ELSEWHERE) as omni:
        yield omni


@pytest.fixture(scope="module")
def plain() -> Iterator[Omni]:
    with Omni("demo", dtype="float32", cache_backend="magcache", prompt_cache_mb=0) as omni:
        yield omni


class Gate:
    """Holds every call of a module until it is opened; notes the threads that call."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.open, self.reached, self.threads = threading.Event(), threading.Event(), list[str]()
        self.open.set()
        self._handle = module.register_forward_pre_hook(self._hold)

    def _hold(self, module: Any, args: Any) -> None:
        self.threads.append(threading.current_thread().name)
        self.reached.set()
        assert self.open.wait(30)

    def remove(self) -> None:
        self.open.set()
        self._handle.remove()


@pytest.fixture
def gate(demo: Omni) -> Iterator[Gate]:
    made = Gate(demo.engine.worker.pipeline.vae.decoder)
    yield made
    made.remove()


def until(omni: Omni, done: Any, outputs: dict[str, Any]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end, "it never came"
        outputs |= {output.request_id: output for output in omni.engine.step()}


def test_pictures_are_the_same_and_their_parts_ran_in_other_threads(demo: Omni, plain: Omni, gate: Gate) -> None:
    params = [
        Params(num_inference_steps=n, seed=n, num_outputs_per_prompt=1 + n % 2, output_type="np") for n in (4, 7, 7, 9)
    ]
    own = demo.generate(PROMPTS, params, use_tqdm=False)
    for one, other in zip(own, plain.generate(PROMPTS, params, use_tqdm=False), strict=True):
        assert one.ok and (one.computed_steps, one.plan) == (other.computed_steps, other.plan)
        for got, wanted in zip(one.images, other.images, strict=True):
            assert_close(torch.as_tensor(got), torch.as_tensor(wanted))
        assert one.stage_durations["decode_s"] > 0
    assert gate.threads and all(name.startswith("vllm-omni-beside") for name in gate.threads)
    assert not demo.engine.has_unfinished_requests() and demo.engine.worker.cache_bytes == 0


def test_the_batch_goes_on_while_a_picture_is_decoded(demo: Omni, gate: Gate) -> None:
    outputs: dict[str, Any] = {}
    gate.open.clear()
    add(demo, "first", PROMPTS[0], SHORT)
    until(demo, gate.reached.is_set, outputs)
    add(demo, "second", PROMPTS[1], Params(num_inference_steps=9, seed=2, output_type="latent"))
    until(demo, lambda: "second" in outputs, outputs)
    assert outputs["second"].ok and "first" not in outputs and demo.engine.stage("first") == "decode"
    gate.open.set()
    assert drain(demo, outputs)["first"].ok


def test_a_request_can_be_aborted_while_it_is_away_and_its_id_used_again(demo: Omni, gate: Gate) -> None:
    outputs: dict[str, Any] = {}
    gate.open.clear()
    add(demo, "a", PROMPTS[0], SHORT)
    until(demo, gate.reached.is_set, outputs)
    demo.engine.abort(["a"])
    assert isinstance(demo.engine.collect()[0].error, RequestAbortedError)
    add(demo, "a", PROMPTS[0], Params(num_inference_steps=2, seed=1, output_type="latent"))
    gate.open.set()
    assert drain(demo, outputs)["a"].latents is not None, "and what the first has left behind ends, too"
    assert len(demo.engine.worker.runner.components.beside) == 0 and demo.engine.step() == []


def test_what_has_ended_elsewhere_is_no_turn_that_takes_long(demo: Omni, gate: Gate) -> None:
    outputs: dict[str, Any] = {}
    gate.open.clear()
    add(demo, "a", PROMPTS[0], SHORT)
    until(demo, gate.reached.is_set, outputs)
    beside = demo.engine.worker.runner.components.beside
    since = beside.since
    time.sleep(0.05)
    assert beside.since == since, "whoever watches the loop sees how long the call takes"
    opened = time.monotonic()
    gate.open.set()
    demo.engine.worker.runner.components.quiet()
    assert since < opened < beside.since, "and that it has ended, though nobody has asked for the result"
    assert drain(demo, outputs)["a"].ok


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "always"])
def test_a_joint_call_that_fails_elsewhere_is_made_one_by_one_and_ends_nobody_else(demo: Omni, times: int) -> None:
    left, threads = [times], set[str]()

    def fail(module: Any, args: Any) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        if (args[0].abs() > 50).any() and left[0]:
            left[0] -= 1
            raise ArithmeticError("poisoned")

    handle = demo.engine.worker.pipeline.vae.decoder.register_forward_pre_hook(fail)
    try:
        huge = [None, torch.full((1, 64, 16), 1e3), None]
        params = [Params(num_inference_steps=4, seed=i, latents=at) for i, at in enumerate(huge)]
        outputs = demo.generate(PROMPTS[:3], params, use_tqdm=False)
    finally:
        handle.remove()
    assert outputs[0].ok and outputs[2].ok and threads == {"vllm-omni-beside"}
    assert outputs[1].ok if times == 1 else isinstance(outputs[1].error, ArithmeticError)


def test_whatever_else_is_done_with_a_part_waits_for_its_calls(demo: Omni, gate: Gate) -> None:
    """A pipeline that encodes a picture, or changes the VAE, must not find it half-way through a decode."""
    outputs: dict[str, Any] = {}
    gate.open.clear()
    add(demo, "first", PROMPTS[0], SHORT)
    until(demo, gate.reached.is_set, outputs)
    part = demo.engine.worker.runner.components.elsewhere["vae"]
    picture, seen = torch.zeros(1, 3, 16, 16), list[Any]()

    def encode() -> None:
        with torch.inference_mode():
            seen.append(part.attribute(part.module, "encode")(picture).latent_dist.mean)

    other = threading.Thread(target=encode)
    other.start()
    time.sleep(0.2)
    assert not seen
    gate.open.set()
    other.join(10)
    with torch.inference_mode():
        assert torch.equal(seen[0], part.module.encode(picture).latent_dist.mean)
    assert drain(demo, outputs)["first"].ok


def test_a_module_inside_is_used_as_if_it_were_here() -> None:
    """What pipelines do with parts of an encoder: index, iterate, call, cast, read a buffer or a signature."""
    inner = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)])
    outer = torch.nn.Module()
    outer.layers = inner
    part = Elsewhere(outer, torch.device("cpu"), torch.device("cpu"))
    layers = part.attribute(outer, "layers")
    assert len(layers) == 2 and isinstance(layers, torch.nn.ModuleList)
    x = torch.ones(1, 2)
    assert torch.equal(layers[0](x), inner[0](x)) and torch.equal(next(iter(layers))(x), inner[0](x))
    assert torch.equal(layers[1].running_mean, inner[1].running_mean)
    layers[1].to(torch.device("meta"), torch.float64)
    assert inner[1].running_mean.dtype == torch.float64 and inner[0].weight.dtype == torch.float32
    assert inner[1].running_mean.device.type == "cpu", "it stays where it is"
    assert part.attribute(outer, "device") == torch.device("cpu")
    assert list(inspect.signature(part.attribute(inner[0], "forward")).parameters) == ["input"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"vae_device": "gpu"}, "vae_device"),
        ({"vae_device": "cpu", "enable_cpu_offload": True}, "enable_cpu_offload"),
        ({"text_encoder_device": "cpu", "enable_layerwise_offload": True}, "enable_layerwise_offload"),
        ({"vae_device": "cpu", "ulysses_degree": 2}, "ulysses_degree"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(OmniError, match=said):
        OmniDiffusionConfig(model="demo", **arguments)


def test_a_model_without_the_part_is_refused() -> None:
    pipeline = tiny_flux()
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    with pytest.raises(InvalidValueError, match="text_encoder_device"):
        Omni.from_pipe(pipeline, defaults=DEFAULTS, text_encoder_device="cpu")
