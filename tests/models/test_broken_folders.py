"""Model folders that are missing, cut or wrong: refused with one error, before any weight loads if files show it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import DEFAULTS, embeds, save_tiny_flux

from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import ModelLoadError
from vllm_omni.model_folder import check_folder, resolve_model, shipped_models

GOOD = {"num_inference_steps": 4, "seed": 0, "output_type": "latent"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_a_valid_folder_loads(folder: Path) -> None:
    assert resolve_model(str(folder)) == str(folder)
    with Omni(str(folder), dtype="float32") as omni:
        for prompt in ("red apple", embeds(0)):
            assert omni.generate(prompt, {**GOOD, **DEFAULTS}, use_tqdm=False)[0].ok


@pytest.mark.parametrize(
    "model", ["/nonexistent", "./nonexistent", "~/nonexistent", "demmo", "a/b/c", "a" * 300, "~nobody-here/x"]
)
def test_a_missing_folder_is_refused_with_the_alternatives(model: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist; give a diffusers folder, a hub id, or one of") as caught:
        Omni(model)
    assert model in str(caught.value)


def test_shipped_names_and_hub_ids_resolve() -> None:
    assert resolve_model("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    for name in shipped_models():
        check_folder(Path(resolve_model(name)))


def test_a_file_is_not_a_model(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"is a file; give the folder that holds model_index\.json"):
        resolve_model(str(folder / "model_index.json"))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def half_index(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(file.read_text()[:40])


def binary_index(folder: Path) -> None:
    (folder / "model_index.json").write_bytes(b"\x80\x02}q\x00\xff")


def list_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def no_part(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "transformer" / "pytorch_model.bin")


def cut_data(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_last_byte(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def cut_length(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x01\x02")


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def list_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"[]")


def odd_header(folder: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def html(folder: Path) -> None:
    """What a download behind a login page leaves."""
    (folder / WEIGHTS).write_text("<!DOCTYPE html><html>" + "x" * 1000)


BROKEN = {
    no_index: r"tiny.*has no model_index\.json.*diffusers model folder",
    half_index: r"model_index\.json.*not complete JSON",
    binary_index: r"model_index\.json.*not complete JSON",
    list_index: r"model_index\.json.*must hold a JSON object",
    no_part: r"model_index\.json names 'vae', but there is no such folder",
    no_weights: r"transformer.*no \.safetensors weights",
    pickled: r"pytorch_model\.bin is pickled.*convert it to safetensors",
    cut_data: r"model\.safetensors.*truncated.*copy it again",
    cut_last_byte: r"model\.safetensors.*truncated",
    cut_header: r"model\.safetensors.*not a safetensors file",
    cut_length: r"model\.safetensors.*not a safetensors file",
    empty: r"model\.safetensors.*not a safetensors file",
    huge_header: r"model\.safetensors.*not a safetensors file",
    list_header: r"model\.safetensors.*not a safetensors file",
    odd_header: r"model\.safetensors.*not a safetensors file",
    html: r"model\.safetensors.*not a safetensors file",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_folder_is_refused_before_any_weight_loads(
    folder: Path, breaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(folder)
    with pytest.raises(ModelLoadError, match=BROKEN[breaks]):
        check_folder(folder)
    monkeypatch.setattr("safetensors.torch.load_file", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ModelLoadError, match=BROKEN[breaks]):
        Omni(str(folder))


def broken_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text('{"num_layers": 2,')


def empty_part(folder: Path) -> None:
    for file in (folder / "transformer").iterdir():
        file.unlink()


def unknown_class(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(file.read_text().replace("FluxPipeline", "NoSuchPipeline"))


def other_shapes(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 3'))


def no_class(folder: Path) -> None:
    file = folder / "model_index.json"
    content = json.loads(file.read_text())
    del content["_class_name"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("breaks", [broken_config, empty_part, unknown_class, other_shapes, no_class])
def test_faults_that_only_diffusers_finds_are_model_load_errors(folder: Path, breaks: Any) -> None:
    breaks(folder)
    with pytest.raises(ModelLoadError) as caught:
        Omni(str(folder))
    assert str(folder) in str(caught.value)


def test_a_broken_generation_config_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        Omni(str(folder))
