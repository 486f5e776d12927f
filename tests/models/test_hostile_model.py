"""Model folders that try to run code, by class names, auto_map, pickles, shards or links: refused, or not read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from pipelines import DEFAULTS, save_tiny_flux

from vllm_omni import Omni
from vllm_omni.errors import ModelLoadError

PART = "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """Its pickle, like the code below, makes the canary."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["CANARY"],)


CODE = """
import os
os.mkdir(os.environ["CANARY"])
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **options):
        return cls()
"""


def edit(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def shards(folder: Path, target: str) -> None:
    """The weights in shards, one of them at `target`."""
    (folder / PART / WEIGHTS).rename(folder / PART / "a.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {"x_embedder.weight": target, "x_embedder.bias": "a.safetensors"},
    }
    (folder / PART / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def pipeline_of_the_repository(folder: Path) -> None:
    (folder / "pipeline.py").write_text(CODE)
    edit(folder / "model_index.json", _class_name=["pipeline", "Evil"])


def pipeline_by_name(folder: Path) -> None:
    (folder / "pipeline.py").write_text(CODE)
    edit(folder / "model_index.json", _class_name="Evil")


def part_of_the_repository(folder: Path) -> None:
    (folder / PART / "evil.py").write_text(CODE)
    edit(folder / "model_index.json", transformer=["evil", "Evil"])


def library_on_the_path(folder: Path) -> None:
    (folder / "evil_library.py").write_text(CODE)
    edit(folder / "model_index.json", transformer=["evil_library", "Evil"])


def library_that_runs_things(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["subprocess", "Popen"])


def library_that_is_a_path(folder: Path) -> None:
    (folder / "evil.py").write_text(CODE)
    edit(folder / "model_index.json", transformer=["../evil", "Evil"])


def part_outside(folder: Path) -> None:
    shutil.copytree(folder / PART, folder.parent / "outside")
    edit(folder / "model_index.json", **{"../outside": ["diffusers", "FluxTransformer2DModel"]})


def pickle_for_weights(folder: Path) -> None:
    (folder / PART / WEIGHTS).unlink()
    (folder / PART / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def pickle_named_safetensors(folder: Path) -> None:
    (folder / PART / WEIGHTS).write_bytes(pickle.dumps(Payload()))


def pickle_as_a_shard(folder: Path) -> None:
    shards(folder, "evil.bin")
    (folder / PART / "evil.bin").write_bytes(pickle.dumps(Payload()))


def shard_outside(folder: Path) -> None:
    shards(folder, "../../outside.safetensors")
    shutil.copy(folder / PART / "a.safetensors", folder.parent / "outside.safetensors")


def link_to_a_secret(folder: Path) -> None:
    (folder / PART / "config.json").unlink()
    (folder / PART / "config.json").symlink_to("/etc/passwd")


def link_without_end(folder: Path) -> None:
    (folder / PART / WEIGHTS).unlink()
    (folder / PART / WEIGHTS).symlink_to(WEIGHTS)


def link_to_nothing(folder: Path) -> None:
    """What a cache leaves whose blobs were removed."""
    (folder / PART / WEIGHTS).unlink()
    (folder / PART / WEIGHTS).symlink_to("../../blobs/0")


def weights_that_never_end(folder: Path) -> None:
    (folder / PART / WEIGHTS).unlink()
    os.mkfifo(folder / PART / WEIGHTS)


REFUSED = [pipeline_of_the_repository, pipeline_by_name, part_of_the_repository, library_on_the_path,
           library_that_runs_things, library_that_is_a_path, part_outside, pickle_for_weights, pickle_named_safetensors,
           pickle_as_a_shard, shard_outside, link_to_a_secret, link_without_end, link_to_nothing,
           weights_that_never_end]  # fmt: skip


def auto_map_of_a_model(folder: Path) -> None:
    for part in ("text_encoder", "text_encoder_2", PART, "vae"):
        (folder / part / "evil.py").write_text(CODE)
        edit(folder / part / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})


def auto_map_of_a_tokenizer(folder: Path) -> None:
    for part in ("tokenizer", "tokenizer_2"):
        (folder / part / "evil.py").write_text(CODE)
        edit(folder / part / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})


def template_of_a_tokenizer(folder: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in cycler.__init__.__globals__ %}{% endfor %}"
    edit(folder / "tokenizer" / "tokenizer_config.json", chat_template=template)


def pickle_beside_the_weights(folder: Path) -> None:
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "optimizer.pt"):
        (folder / PART / name).write_bytes(pickle.dumps(Payload()))


IGNORED = [auto_map_of_a_model, auto_map_of_a_tokenizer, template_of_a_tokenizer, pickle_beside_the_weights]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good model's folder, which is where the process stands and where Python looks for modules."""
    copy = Path(shutil.copytree(saved, tmp_path / "tiny"))
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy)
    return copy


def test_loading_the_payload_is_detected(folder: Path) -> None:
    pickle.loads(pickle.dumps(Payload()))
    assert (folder.parent / "canary").exists()


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack.__name__)
def test_a_folder_that_would_run_code_is_refused(folder: Path, attack: Callable[[Path], None]) -> None:
    attack(folder)
    with pytest.raises(ModelLoadError) as caught:
        Omni(str(folder), dtype="float32")
    assert not (folder.parent / "canary").exists()
    assert "root:" not in str(caught.value), "what a link points to is not shown"


@pytest.mark.parametrize("attack", IGNORED, ids=lambda attack: attack.__name__)
def test_code_beside_the_model_is_not_read(folder: Path, attack: Callable[[Path], None]) -> None:
    attack(folder)
    with Omni(str(folder), dtype="float32") as omni:
        assert omni.generate("x", {"num_inference_steps": 1, **DEFAULTS}, use_tqdm=False)[0].ok
    assert not (folder.parent / "canary").exists()


@pytest.mark.slow
def test_a_hub_model_is_checked_like_a_folder(folder: Path, tmp_path: Path) -> None:
    """From a cache as the hub's client leaves it, without a network: a good model loads, a hostile one is refused."""
    for name, attack in (("good", None), ("evil", pickle_as_a_shard)):
        commit = "0" * 40
        cached = tmp_path / "hub" / f"models--someone--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        copy = Path(shutil.copytree(folder, cached / "snapshots" / commit))
        if attack is not None:
            attack(copy)
    code = (
        "from vllm_omni import Omni\n"
        "from vllm_omni.errors import ModelLoadError\n"
        "Omni('someone/good', dtype='float32').close()\n"
        "try: Omni('someone/evil', dtype='float32')\n"
        "except ModelLoadError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "names 'evil.bin', which is no .safetensors file beside it" in ran.stdout, ran.stdout
    assert not (tmp_path / "canary").exists()
