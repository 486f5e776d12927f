"""`vllm-omni calibrate`: measures a profile with its provenance, which is then found and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import TEXT_TOKENS, embeds, tiny_flux
from planning import plan_cost

from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.profile import fingerprint, load_profile
from vllm_omni.diffusion.data import DiffusionCacheConfig, OmniDiffusionConfig
from vllm_omni.diffusion.loader import load_pipeline
from vllm_omni.entrypoints.cli.calibrate import split
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import InvalidValueError
from vllm_omni.quality.calibrate import cache_of, calibrate, enabled, judge, latents, sha256_of
from vllm_omni.quality.pairs import read_prompts
from vllm_omni.trials import FORECASTS, Away

CAPTIONS = ["red apple", "penguin", "rocket", "banana", "guitar", "octopus", "teapot", "whale"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, on the shipped model with a few captions and steps."""
    folder = tmp_path_factory.mktemp("calibrate")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    out = folder / "made.json"
    command = f"calibrate demo --dtype float32 --steps 8 --seed 5 --prompts {folder}/prompts.txt --out {out}"
    assert main(command.split()) == 0
    return out


@pytest.mark.slow
def test_the_calibrated_profile_records_its_provenance(made: Path) -> None:
    profile = load_profile(made)
    said = profile.provenance
    assert len(profile.ratios) == 8 and profile.gram is not None
    assert said["steps"] == 8 and said["arguments"]["height"] == said["arguments"]["width"] == 64
    assert said["prompts"] == 3 and said["prompts_sha256"] == sha256_of(CAPTIONS[0::2][:3])  # the last is to choose by
    assert said["scheduler"] == "FlowMatchEulerDiscreteScheduler" and said["scheduler_config"]["shift"] == 3.0
    assert {"vllm_omni", "torch", "diffusers", "python"} <= said["versions"].keys()
    assert [len(spread) for spread in said["ratio_std"].values()] == [8]
    assert 0 < said["gram_relative_error"] < 1
    assert profile.gains is not None and profile.gain_errors is not None and min(profile.gains) > 0
    assert made.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_budgets_are_measured_on_held_out_prompts(made: Path) -> None:
    profile = load_profile(made)
    judged = profile.provenance["held_out"]
    assert judged["prompts"] == 4 and judged["prompts_sha256"] == sha256_of(CAPTIONS[1::2])
    assert [round(8 / budget.speedup) for budget in profile.budgets] == [6, 5, 4, 3, 2]
    for budget in profile.budgets:
        assert budget.pairs == 4 and budget.predictor in FORECASTS[budget.mask, budget.forecasts]
        assert budget.psnr is not None and budget.psnr_mean is not None and budget.rule_psnr is not None
        assert budget.rule_psnr - 1 < budget.psnr <= budget.psnr_mean
    assert profile.lacks == []


@pytest.mark.slow
def test_a_gain_tells_how_far_an_error_ends(made: Path) -> None:
    """Of plans that calibration has not run, with two stale steps each, on a few prompts that it has not seen."""
    profile = load_profile(made)
    assert profile.sigmas is not None and profile.gram is not None
    pipeline, arguments = (
        load_pipeline(OmniDiffusionConfig(model="demo", dtype="float32")),
        profile.provenance["arguments"],
    )
    unseen = [(prompt, 77 + i) for i, prompt in enumerate(("violin", "tiger", "castle", "honeybee"))]
    exact = [latents(pipeline, *one, arguments) for one in unseen]
    for skipped in ((1, 4), (2, 5), (3, 6), (2, 3)):
        plan = tuple(step not in skipped for step in range(8))
        with enabled(cache_of(profile, steps_mask=plan, predictor="reuse"), pipeline, profile):
            got = [latents(pipeline, *one, arguments) for one in unseen]
        squares = [(a - b).pow(2).mean().item() for a, b in zip(got, exact, strict=True)]
        away, gram, gains = np.exp(np.mean(np.log(squares)) / 2), np.asarray(profile.gram), np.asarray(profile.gains)
        expected = plan_cost(plan, profile.sigmas, "reuse", gram, gains)
        assert 0.4 < away / expected < 2.5, skipped


@pytest.mark.slow
def test_a_calibrated_profile_is_found_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    pipe = tiny_flux()
    with pytest.raises(InvalidValueError, match="vllm-omni calibrate"):
        MagCacheBackend(DiffusionCacheConfig()).enable(pipe)
    pipe.encode_prompt = lambda prompt, **_: (*embeds(len(prompt)).values(), torch.zeros(TEXT_TOKENS, 3))
    profile = calibrate(pipe, ["a", "bb"], "new", num_inference_steps=6, height=32, width=32)
    assert profile.fingerprint == fingerprint(pipe.transformer)
    profile = judge(pipe, profile, ["a"], ["ccc"], 9, num_inference_steps=6, height=32, width=32)
    profile.save(tmp_path / "new.json")
    backend = MagCacheBackend(DiffusionCacheConfig())
    backend.enable(pipe)
    assert backend.profiles == (load_profile(tmp_path / "new.json"),)


def test_a_sampler_with_noise_of_its_own_gets_a_matrix_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_flux()
    pipe.encode_prompt = lambda prompt, **_: (*embeds(len(prompt)).values(), torch.zeros(TEXT_TOKENS, 3))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    arguments: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32}
    profile = calibrate(pipe, ["a", "bb"], "new", **arguments)
    assert profile.gram is not None and profile.gains is None
    assert "FlowMatchEulerDiscreteScheduler" in caplog.text and "draws noise" in caplog.text
    assert judge(pipe, profile, ["a"], ["ccc"], 9, **arguments) == profile


@pytest.mark.slow
def test_a_sketch_keeps_what_residuals_differ_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected error of every forecast, from sketches of a quarter and from whole residuals."""
    pipe = tiny_flux()
    pipe.encode_prompt = lambda prompt, **_: (*embeds(len(prompt)).values(), torch.zeros(TEXT_TOKENS, 3))
    arguments: dict[str, Any] = {"num_inference_steps": 8, "height": 128, "width": 128}
    whole, sketched = (np.asarray(calibrate(pipe, ["a"], "x", sketch=n, **arguments).gram) for n in (10**9, 1021))
    assert not np.array_equal(whole, sketched)

    def away(gram: np.ndarray) -> np.ndarray:
        energy = np.diag(gram)
        return energy[:, None] + energy - 2 * gram + np.eye(8)

    bound = 5 * np.sqrt(2 / 1021)  # standard deviations of the projection
    assert np.abs(away(sketched) / away(whole) - 1).max() < bound


def test_every_other_prompt_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join("abcdefg"))
    lines = read_prompts(file, 100)
    kept, held_out = split(lines)
    assert kept == list("aceg") and held_out == list("bdf")
    assert read_prompts(file, 3) == list("ace")


def test_decibels_of_known_errors() -> None:
    assert [Away(error**2, 1.0).decibels for error in (0.1, 0.01)] == pytest.approx([20.0, 40.0])


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
