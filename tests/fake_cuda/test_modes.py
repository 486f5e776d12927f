"""Ways of loading on the fake device: parts in main memory, blocks in main memory, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES
from pipelines import CURVE, DEFAULTS, embeds, save_tiny_flux, tiny_flux
from torch._dynamo.utils import counters

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.calibration import sketch
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import prepare
from vllm_omni.engine.cost import no_costs
from vllm_omni.engine.describe import describe
from vllm_omni.engine.loop import warm_up
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.graphs import graph_breaks

CACHE: dict[str, Any] = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}
PROMPTS = ["red apple", "a penguin in snow", "x"]
ASKED = [Params(num_inference_steps=6, seed=i, height=32, width=32, output_type="latent") for i in range(3)]
MODES = [{}, {"enable_cpu_offload": True}, {"enable_layerwise_offload": True}]


def made(folder: str, **engine_args: Any) -> list[torch.Tensor]:
    with Omni(folder, dtype="float32", **CACHE, **engine_args) as omni:
        outputs = omni.generate(PROMPTS, ASKED, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 3
    assert all(output.skipped_steps > 0 for output in outputs)
    return [output.latents.cpu() for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_flux(tmp_path_factory.mktemp("models") / "flux"))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: next(iter(mode), "on the device"))
def test_wherever_the_weights_are_the_pictures_are_the_same(folder: str, mode: dict[str, Any]) -> None:
    for there, here in zip(made(folder, device="cuda", **mode), made(folder, device="cpu"), strict=True):
        assert torch.allclose(there, here, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("there", ["cpu", "cuda:1"])
def test_encoders_and_decoder_on_another_device_make_the_same_pictures(folder: str, there: str) -> None:
    asked = [Params(num_inference_steps=6, seed=i, height=32, width=32, output_type="np") for i in range(3)]
    made = []
    for where in ({"device": "cuda", "text_encoder_device": there, "vae_device": there}, {"device": "cpu"}):
        with Omni(folder, dtype="float32", **CACHE, **where) as omni:
            devices = {name: part.device for name, part in omni.engine.worker.pipeline.components.items()
                       if isinstance(part, torch.nn.Module)}  # fmt: skip
            outputs = omni.generate(PROMPTS, asked, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * 3
        made.append([torch.as_tensor(output.images[0]) for output in outputs])
        if where["device"] == "cuda":
            assert devices["transformer"] == torch.device("cuda:0")
            assert {devices[name] for name in ("text_encoder", "text_encoder_2", "vae")} == {torch.device(there)}
    for one, other in zip(*made, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("cuda")
def test_a_pipeline_in_memory_gets_its_decoder_back() -> None:
    pipeline = tiny_flux().to("cuda")
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, vae_device="cpu") as omni:
        assert pipeline.vae.device.type == "cpu"
        params = Params(num_inference_steps=2, seed=1, height=32, width=32)
        assert omni.generate(embeds(0), params, use_tqdm=False)[0].error is None
    assert pipeline.vae.device.type == "cuda"
    with pytest.raises(InvalidValueError, match=r"vae_device.*denoiser's own"):
        Omni.from_pipe(pipeline, defaults=DEFAULTS, vae_device="cuda:0")


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("leaves", [False, True], ids=["blocks", "leaves"])
@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streams"])
def test_groups_that_their_owner_offloads(leaves: bool, stream: bool) -> None:
    pipeline = tiny_flux()
    pipeline.vae.to("cuda")
    how: dict[str, Any] = {"offload_type": "leaf_level"} if leaves else {"offload_type": "block_level"}
    how |= {} if leaves else {"num_blocks_per_group": 1}
    pipeline.transformer.enable_group_offload(torch.device("cuda"), torch.device("cpu"), use_stream=stream, **how)
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, **CACHE) as omni:
        outputs = omni.generate([embeds(i) for i in range(3)], ASKED, use_tqdm=False)
    assert all(output.error is None and output.skipped_steps > 0 for output in outputs)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what torch.compile compiles; the graphs run as they are, on a CPU: the compiler needs a real device."""
    torch._dynamo.reset()
    counters.clear()
    found: list[int] = []

    def run_as_it_is(graph: Any, examples: Any) -> Callable[..., Any]:
        found.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=run_as_it_is))
    return found


@pytest.mark.slow
def test_a_warm_up_compiles_for_every_size_of_a_batch(folder: str, graphs: list[int]) -> None:
    with Omni(folder, dtype="float32", device="cpu", enforce_eager=False, **CACHE) as omni:
        engine = omni.engine
        warm_up(engine, describe(engine, {}), no_costs())
        compiled = len(graphs)
        assert compiled > 0 and list(graph_breaks()) == []
        for n in (1, 2, 3, 5, 8, 1):
            asked = [ASKED[0].clone() for _ in range(n)]
            outputs = omni.generate([PROMPTS[i % 3] for i in range(n)], asked, use_tqdm=False)
            assert all(output.error is None for output in outputs)
        assert len(graphs) == compiled


@pytest.mark.slow
def test_both_experts_are_compiled(graphs: list[int]) -> None:
    family = next(f for f in FAMILIES if f.name == "Wan 2.2 (two experts)")
    pipeline = family.build()
    prepare(pipeline, OmniDiffusionConfig(model="demo", enforce_eager=False), "cpu", torch.float32)
    for expert in (pipeline.transformer, pipeline.transformer_2):
        assert all(block._compiled_call_impl is not None for block in expert.blocks)
    with Omni.from_pipe(pipeline, defaults=family.settings) as omni:
        (output,) = omni.generate(
            [family.prompt(0)], Params(num_inference_steps=6, seed=0, output_type="latent"), use_tqdm=False
        )
    assert output.error is None and graphs


@pytest.mark.usefixtures("cuda")
def test_a_residual_is_sketched_where_it_is() -> None:
    residual = torch.randn(3, 30_000, generator=torch.Generator().manual_seed(0))
    sketches = [sketch(residual.to("cuda")) for _ in range(2)]
    assert sketches[0].is_cuda and torch.equal(sketches[0].cpu(), sketches[1].cpu())
    assert float(sketches[0].square().sum()) == pytest.approx(float(residual.square().mean()), rel=0.2)
