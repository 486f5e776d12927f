"""Engines that learn a profile while they serve, driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.engine.describe import describe
from vllm_omni.engine.learning import IdleLearning
from vllm_omni.learning import REQUESTS, Learning
from vllm_omni.outputs import OmniRequestOutput

SIZE: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent"}


def learning(folder: Path, **config: Any) -> Omni:
    """An engine over the model in a folder."""
    config = {"calibrate": "auto"} | config
    return Omni(str(folder), dtype="float32", cache_backend="magcache", cache_config=config)


def learning_over(pipeline: Any, **config: Any) -> Omni:
    """An engine over a pipeline."""
    config = {"calibrate": "auto"} | config
    return Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=config)


def learning_of(omni: Omni) -> Learning:
    learner = omni.engine.worker.learner
    assert learner is not None and learner.learning is not None
    return learner.learning


def idle_of(omni: Omni) -> IdleLearning:
    return IdleLearning(omni.engine, describe(omni.engine, {}))


def teach(omni: Omni, steps: int, prompt: Any = "red apple", **more: Any) -> CacheProfile:
    """As many requests as a profile takes; returns it."""
    for seed in range(REQUESTS):
        params = Params(num_inference_steps=steps, seed=seed, **SIZE | more)
        (output,) = omni.generate(prompt, params, use_tqdm=False)
        assert output.ok, output.error
    learner = omni.engine.worker.learner
    assert learner is not None
    learner.learn()
    return learner.profiles[0]


def run_once(idle: IdleLearning, omni: Omni, spoil: Callable[[OmniRequestOutput], None] = lambda output: None) -> None:
    """One run that nobody asked for, to its end; `spoil` may change what comes of it."""
    idle.begin()
    while omni.engine.has_unfinished_requests():
        for output in omni.engine.step():
            spoil(output)
            assert idle.takes(output)
