"""`vllm-omni calibrate`: measures a profile with its provenance, which is then found and used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import TEXT_TOKENS, embeds, tiny_flux

from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
from vllm_omni.diffusion.cache.profile import fingerprint, load_profile
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.entrypoints.cli.calibrate import split
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import InvalidValueError
from vllm_omni.quality.calibrate import calibrate, decibels, judge, sha256_of
from vllm_omni.quality.pairs import read_prompts

CAPTIONS = ["red apple", "penguin", "rocket", "banana", "guitar", "octopus"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, on the shipped model with a few captions and steps."""
    folder = tmp_path_factory.mktemp("calibrate")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    out = folder / "made.json"
    command = f"calibrate demo --dtype float32 --steps 8 --hold-out --seed 5 --prompts {folder}/prompts.txt --out {out}"
    assert main(command.split()) == 0
    return out


@pytest.mark.slow
def test_the_calibrated_profile_records_its_provenance(made: Path) -> None:
    profile = load_profile(made)
    said = profile.provenance
    assert len(profile.ratios) == 8 and profile.gram is not None
    assert said["steps"] == 8 and said["arguments"]["height"] == said["arguments"]["width"] == 64
    assert said["prompts"] == 3 and said["prompts_sha256"] == sha256_of(CAPTIONS[0::2])
    assert said["scheduler"] == "FlowMatchEulerDiscreteScheduler" and said["scheduler_config"]["shift"] == 3.0
    assert {"vllm_omni", "torch", "diffusers", "python"} <= said["versions"].keys()
    assert [len(spread) for spread in said["ratio_std"].values()] == [8]
    assert 0 < said["gram_relative_error"] < 1
    errors = said["predictor_relative_error"]
    assert [speedup for speedup, _ in profile.predictors] == [float(speedup) for speedup in errors]
    for (_, best), found in zip(profile.predictors, errors.values(), strict=True):
        assert found.keys() == PREDICTORS.keys() and found[best] == min(found.values())
    assert made.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_auto_is_judged_on_held_out_prompts(made: Path) -> None:
    profile = load_profile(made)
    judged = profile.provenance["held_out"]
    assert judged["prompts"] == 3 and judged["prompts_sha256"] == sha256_of(CAPTIONS[1::2])
    *worse, chosen = judged["forwards"].items()
    assert chosen[0] == str(profile.forwards)
    assert chosen[1]["worst_db"] >= 30 and chosen[1]["mean_db"] > chosen[1]["fewer_steps_mean_db"]
    for _, row in worse:
        assert row["worst_db"] < 30 or row["mean_db"] <= row["fewer_steps_mean_db"]


def test_a_calibrated_profile_is_found_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    pipe = tiny_flux()
    with pytest.raises(InvalidValueError, match="vllm-omni calibrate"):
        MagCacheBackend(DiffusionCacheConfig()).enable(pipe)
    pipe.encode_prompt = lambda prompt, **_: (*embeds(len(prompt)).values(), torch.zeros(TEXT_TOKENS, 3))
    profile = calibrate(pipe, ["a", "bb"], "new", num_inference_steps=6, height=32, width=32)
    assert profile.fingerprint == fingerprint(pipe.transformer)
    profile = judge(pipe, profile, ["ccc"], 9, num_inference_steps=6, height=32, width=32)
    profile.save(tmp_path / "new.json")
    backend = MagCacheBackend(DiffusionCacheConfig())
    backend.enable(pipe)
    assert backend.profiles == (load_profile(tmp_path / "new.json"),)


def test_every_other_prompt_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join("abcdefg"))
    lines = read_prompts(file, 100)
    kept, held_out = split(lines)
    assert kept == list("aceg") and held_out == list("bdf")
    assert read_prompts(file, 3) == list("ace")


def test_decibels_of_known_errors() -> None:
    exact = np.zeros((2, 4, 4, 3))
    assert decibels(exact + np.array([0.1, 0.01]).reshape(2, 1, 1, 1), exact) == pytest.approx([20.0, 40.0])


def test_bad_arguments_name_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (f"--prompts {tmp_path}/none.txt", f"--prompts {tmp_path}/empty.txt"):
        (tmp_path / "empty.txt").write_text("\n\n")
        assert main(f"calibrate demo {text} --out {tmp_path}/x.json".split()) == 2
        assert "--prompts" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("name", ["demo", "demo-50"])
def test_the_shipped_profiles_of_the_demo_hold_out_every_other_caption(name: str) -> None:
    import vllm_omni

    root = Path(vllm_omni.__file__).parent
    said = json.loads((root / f"diffusion/cache/profiles/{name}.json").read_text())["provenance"]
    kept, held_out = split(read_prompts(root / "assets/demo/captions.txt", 10_000))
    assert said["prompts_sha256"] == sha256_of(kept[: said["prompts"]])
    assert said["held_out"]["prompts"] >= 64
    assert said["held_out"]["prompts_sha256"] == sha256_of(held_out[: said["held_out"]["prompts"]])
