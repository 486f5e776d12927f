"""A fault injected into any stage of the engine fails one request, and ended requests free their tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from traceback import format_exception
from typing import Any

import numpy as np
import pytest
import torch
from closeness import levels_apart
from pipelines import embeds
from process_client import ARGS

from vllm_omni import Omni
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.inputs.data import normalise_prompt
from vllm_omni.outputs import OmniRequestOutput


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffusionEngine]:
    made = DiffusionEngine(OmniDiffusionConfig(**ARGS))
    yield made
    made.close()


def add(engine: DiffusionEngine, name: str, prompt: str = "sun", **params: Any) -> None:
    given = Params(**{"seed": 1, "num_inference_steps": 12, "cache": "fast"} | params)
    engine.add_request(OmniDiffusionRequest(name, prompt, normalise_prompt(prompt), given))


def finish(engine: DiffusionEngine) -> dict[str, OmniRequestOutput]:
    ended: dict[str, OmniRequestOutput] = {}
    while engine.has_unfinished_requests():
        ended |= {output.request_id: output for output in engine.step()}
    return ended


@pytest.mark.parametrize("place", ["encode", "step", "cache", "decode"])
def test_a_fault_at_any_stage_fails_only_its_own_request(
    engine: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    add(engine, "alone")
    alone = np.asarray(finish(engine)["alone"].images[0], int)
    pipeline, seen = engine.worker.pipeline, []

    def failing(original: Any, hits: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            if hits(args, kwargs):
                seen.append(place)
                raise RuntimeError("injected")
            return original(*args, **kwargs)

        return act

    if place == "encode":
        failed = failing(pipeline.encode_prompt, lambda args, kwargs: kwargs["prompt"] == "bad")
        monkeypatch.setattr(pipeline, "encode_prompt", failed)
    elif place == "step":
        module = pipeline.transformer
        failed = failing(module.forward, lambda args, kwargs: bool((kwargs["guidance"] == 9.0).any()))
        monkeypatch.setattr(module, "forward", failed)
    elif place == "decode":  # the bad one is the first to end
        monkeypatch.setattr(pipeline.vae, "decode", failing(pipeline.vae.decode, lambda args, kwargs: not seen))
    for i in range(3):
        add(engine, f"good-{i}")
    add(engine, "bad", "bad", guidance_scale=9.0, **({"num_inference_steps": 2} if place == "decode" else {}))
    first = engine.step()
    if place == "cache":
        while engine.stage("bad") != "denoise":
            first += engine.step()
        cache = engine._entries["bad"].running.cache
        monkeypatch.setattr(cache, "forecast", failing(cache.forecast, lambda args, kwargs: True))
    ended = {output.request_id: output for output in first} | finish(engine)
    assert seen and isinstance(ended["bad"].error, RuntimeError) and not ended["bad"].images
    for i in range(3):
        assert levels_apart(ended[f"good-{i}"].images[0], alone) <= 1
    assert engine.worker.cache_bytes == 0


@pytest.mark.slow
def test_an_error_that_somebody_keeps_keeps_no_tensors(tiny: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own frames nor those of the error that it followed from."""

    def failing(*args: Any, **kwargs: Any) -> Any:
        latents = kwargs["hidden_states"] + 1
        try:
            raise KeyError(latents.shape)
        except KeyError:
            raise RuntimeError("injected") from None

    monkeypatch.setattr(tiny.engine.worker.pipeline.transformer, "forward", failing)
    prompt, kept, counts = embeds(0), [], []
    for _ in range(4):
        kept += tiny.generate([prompt] * 2, Params(num_inference_steps=4), use_tqdm=False)
        gc.collect()
        counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3]
    for output in kept:
        assert isinstance(output.error, RuntimeError)
        lines = "".join(format_exception(output.error))
        assert "in failing" in lines and "pipeline_flux.py" in lines  # where it was raised, and who called


def test_aborted_requests_free_their_tensors_without_the_garbage_collector(engine: DiffusionEngine) -> None:
    """What a request held is free the moment it ends: no cycle keeps its tensors until a collection."""

    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(3):
            names = [f"left-{turn}-{i}" for i in range(8)]
            for name in names:
                add(engine, name)
            for _ in range(3):
                engine.step()
            engine.abort(names)
            assert len(engine.collect()) == 8
            counts.append(tensors())
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2] and engine.worker.cache_bytes == 0
