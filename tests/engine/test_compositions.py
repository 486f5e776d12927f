"""The cache together with what diffusers does to weights: fp8 storage, quantised layers, compiled blocks, offload.

Each is set up as its users do it, then served with the cache on, and compared with plain diffusers set up the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from lanes import lane
from pipelines import CURVE, DEFAULTS, count_blocks, embeds, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params


def fp8_storage(pipeline: Any) -> None:
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def group_offload(pipeline: Any) -> None:
    """On a CPU both ends are the same device: it shows that the hooks and the cache leave each other alone."""
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def compiled_blocks(pipeline: Any) -> None:
    pipeline.transformer.compile_repeated_blocks(backend="eager", dynamic=True)


def compiled_whole(pipeline: Any) -> None:
    pipeline.transformer.compile(backend="eager", dynamic=True)


def int8_weights(pipeline: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(pipeline.transformer, torchao.Int8WeightOnlyConfig())


SETUPS = [fp8_storage, group_offload, compiled_blocks, compiled_whole, int8_weights]


@pytest.mark.parametrize(
    "setup", lane(SETUPS, lambda setup: "compiled" not in setup.__name__), ids=lambda f: f.__name__
)
def test_cached_batches_equal_plain_diffusers_with_the_same_setup(setup: Callable[[Any], None]) -> None:
    torch.compiler.reset()
    plain = tiny_flux()
    setup(plain)
    wanted = [run_latents(plain, i=i, seed=i, num_inference_steps=4 + i) for i in range(2)]

    pipeline = tiny_flux()
    setup(pipeline)
    config = {"mag_ratios": CURVE}
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, cache_backend="magcache", cache_config=config) as omni:
        prompts = [embeds(i) for i in range(2)]
        nothing_skipped = {"threshold": 1e-9}
        parameters = [
            Params(num_inference_steps=4 + i, seed=i, output_type="latent", cache=nothing_skipped) for i in range(2)
        ]
        for output, latents in zip(omni.generate(prompts, parameters, use_tqdm=False), wanted, strict=True):
            assert output.ok, output.error
            assert output.skipped_steps == 0
            assert_close(output.latents, latents)
        parameters = [Params(num_inference_steps=10 + i, seed=i, output_type="latent") for i in range(2)]
        together = omni.generate(prompts, parameters, use_tqdm=False)
        counter = count_blocks(pipeline)
        for prompt, params, output in zip(prompts, parameters, together, strict=True):
            counter.reset()
            alone = omni.generate(prompt, params, use_tqdm=False)[0]
            assert output.ok and alone.ok, (output.error, alone.error)
            assert alone.computed_steps == output.computed_steps < params.num_inference_steps
            if setup is not compiled_whole:  # a traced module calls no hooks that came later
                assert counter.count == alone.computed_steps
            assert_close(output.latents, alone.latents)
        counter.remove()
        assert omni.engine.worker.cache_bytes == 0
    after = run_latents(pipeline, i=0, seed=0, num_inference_steps=4)
    assert_close(after, wanted[0])
