"""Parts of a model that take turns on the device, and blocks that come one by one, on the fake device."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from families import FAMILIES
from pipelines import save_tiny_flux, tiny_flux
from safetensors.torch import load_file, save_file
from stepping import add
from torch.nn import Linear, Module

import fake_cuda
from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.engine.weights import _groups
from vllm_omni.kernels import placement
from vllm_omni.kernels.device import is_out_of_memory
from vllm_omni.kernels.placement import take_turns

pytestmark = pytest.mark.usefixtures("cuda")
FEW = Params(num_inference_steps=6, seed=0, height=32, width=32, output_type="np")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_flux(tmp_path_factory.mktemp("models") / "flux"))


def resident(pipeline: Any) -> set[str]:
    """The parts that have a weight on the device."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, Module)}
    return {name for name, part in parts.items() if any(weight.is_cuda for weight in part.parameters())}


def seen_while(omni: Omni) -> set[frozenset[str]]:
    """What was on the device together, after each step until all requests have ended."""
    found = set()
    while omni.engine.has_unfinished_requests():
        for output in omni.engine.step():
            assert output.error is None
        found.add(frozenset(resident(omni.engine.worker.pipeline)))
    return found


def test_requests_that_overlap_bring_one_part_at_a_time(folder: str) -> None:
    """Also with hooks that are new, as after an adapter was loaded."""
    with Omni(folder, device="cuda", dtype="float32", enable_cpu_offload=True) as omni:
        pipeline, found = omni.engine.worker.pipeline, set()
        for begins in range(3):
            pipeline.enable_model_cpu_offload(device="cuda")
            add(omni, f"{begins}", f"red apple {begins}", FEW)
            for _ in range(4):
                omni.engine.step()
                found.add(frozenset(resident(pipeline)))
        found |= seen_while(omni)
    assert {len(parts) for parts in found} <= {0, 1}
    assert set().union(*found) == {"text_encoder", "text_encoder_2", "transformer", "vae"}


@pytest.mark.parametrize("said", [True, False], ids=["an engine's own", "the caller's"])
def test_two_experts_take_turns_and_not_in_every_step(said: bool) -> None:
    """One request is with the first while the other is with the second: each keeps the device for some forwards."""
    family = next(f for f in FAMILIES if f.name == "Wan 2.2 (two experts)")
    pipeline = family.build()
    pipeline.enable_model_cpu_offload(device="cuda")
    given = {"defaults": family.settings, "device": "cuda", "enable_cpu_offload": said}
    asked = Params(num_inference_steps=16, seed=0, output_type="latent")
    with Omni.from_pipe(pipeline, **given) as omni:
        add(omni, "first", family.prompt(0), asked)
        while resident(pipeline) != {"transformer_2"}:
            omni.engine.step()
        add(omni, "second", family.prompt(1), asked)
        order = []
        while omni.engine.has_unfinished_requests():
            for output in omni.engine.step():
                assert output.error is None
            order += [resident(pipeline)]
    assert all(len(parts) == 1 for parts in order)
    moves = sum(before != after for before, after in pairwise(order))
    assert 1 <= moves <= len(order) / 3


def test_what_has_no_place_in_the_order_stays_beside_a_denoiser_and_no_longer() -> None:
    parts: dict[str, Any] = {name: Linear(4, 4) for name in ("encoder", "denoiser", "decoder", "control")}
    pipeline, before = SimpleNamespace(_all_hooks=[], components=parts), None
    for name in ("encoder", "denoiser", "decoder", "control"):
        _, hook = cpu_offload_with_hook(parts[name], "cuda:0", before if name != "control" else None)
        pipeline._all_hooks.append(before := hook)
    x, found = torch.zeros(1, 4, device="cuda:0"), []
    for _ in range(2):
        take_turns(pipeline, [parts["denoiser"]])
    for name in ("encoder", "control", "denoiser", "control", "denoiser", "encoder", "denoiser", "control", "decoder"):
        parts[name](x)
        found.append(resident(pipeline))
    both = {"denoiser", "control"}
    assert found[2:5] == [both] * 3 and found[5:7] == [{"encoder"}, {"denoiser"}]
    assert found[7:] == [both, {"decoder"}]


class Large(Module):
    """Its first parameter is the last to be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.layers = torch.nn.ModuleList(Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def test_a_part_that_found_no_room_amid_its_move_is_taken_back() -> None:
    part = Large()
    _, hook = cpu_offload_with_hook(part, "cuda:0")
    pipeline, x = SimpleNamespace(_all_hooks=[hook], components={"part": part}), torch.zeros(1, 64, device="cuda:0")
    take_turns(pipeline, [])
    with fake_cuda.limit(fake_cuda.used(0) + 5 * 64 * 65 * 4):
        with pytest.raises(RuntimeError) as short:
            part(x)
        assert is_out_of_memory(short.value) and not resident(pipeline)
    part(x)
    assert all(weight.is_cuda for weight in part.parameters())


def made(omni: Omni) -> torch.Tensor:
    (output,) = omni.generate(["red apple"], FEW, use_tqdm=False)
    assert output.error is None
    return torch.as_tensor(output.images[0])


@pytest.fixture
def layerwise(folder: str) -> Any:
    """Blocks come one by one; the last step has no need of them, and leaves the first one on the device."""
    config = {"steps_mask": [1, 1, 1, 0, 1, 0], "predictor": "reuse", "compute_last_step": False}
    given: dict[str, Any] = {"cache_backend": "magcache", "cache_config": config, "dtype": "float32", "device": "cuda"}
    with Omni(folder, enable_layerwise_offload=True, **given) as omni:
        made(omni)
        assert resident(omni.engine.worker.pipeline) == {"transformer"}
        assert all(group.stream is not None for group in _groups(omni.engine.worker.pipeline) if group.cpu_param_dict)
        yield omni


def held(omni: Omni) -> int:
    """Bytes of the blocks' weights in main memory."""
    kept = [tensor for group in _groups(omni.engine.worker.pipeline) for tensor in group.cpu_param_dict.values()]
    assert kept
    return sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("level", [1, 2])
def test_offloaded_blocks_sleep_and_wake(layerwise: Omni, level: int) -> None:
    before, kept = made(layerwise), held(layerwise)
    layerwise.sleep(level)
    assert not resident(layerwise.engine.worker.pipeline)
    assert held(layerwise) == (0 if level == 2 else kept)
    layerwise.wake_up()
    assert held(layerwise) == kept and torch.equal(made(layerwise), before)


def test_new_weights_reach_offloaded_blocks(layerwise: Omni, folder: str, tmp_path: Path) -> None:
    before = made(layerwise)
    (file,) = Path(folder, "transformer").glob("*.safetensors")
    save_file({name: 0.5 * weight for name, weight in load_file(file).items()}, tmp_path / file.name)
    layerwise.update_weights_from_disk(str(tmp_path), ["transformer"])
    after = made(layerwise)
    for group in _groups(layerwise.engine.worker.pipeline):
        group.offload_()
    weights = layerwise.engine.worker.pipeline.transformer.state_dict()
    assert all(torch.equal(weights[name], new) for name, new in load_file(tmp_path / file.name).items())
    assert not torch.equal(after, before)
    layerwise.update_weights_from_disk(str(Path(folder, "transformer")), ["transformer"])
    assert torch.equal(made(layerwise), before)


@pytest.mark.parametrize("room", [0, 2**40])
def test_pages_stay_locked_if_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(placement, "_host_room", lambda: room)
    pipeline = tiny_flux()
    placement.offload_blocks(pipeline, "cuda", ["transformer"])
    groups = _groups(pipeline)
    streamed = [group for group in groups if group.stream is not None]
    assert 0 < len(streamed) < len(groups) and {group.low_cpu_mem_usage for group in streamed} == {room == 0}


def test_memory_that_is_left_is_known() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert whole / 1000 < placement._host_room() < whole
