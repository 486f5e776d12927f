"""`vllm-omni calibrate`: measures a profile with its provenance, which is then found and used."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from families import flux2, qwen_edit, wan_i2v
from paths import ROOT
from pipelines import TEXT_TOKENS, embeds, tiny_flux, tiny_wan
from planning import plan_cost
from zoo_prompts import flux3

from vllm_omni.diffusion.cache.calibration import sketch
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.profile import fingerprint, load_profile, named_profile
from vllm_omni.diffusion.data import DiffusionCacheConfig, OmniDiffusionConfig
from vllm_omni.diffusion.loader import load_pipeline
from vllm_omni.entrypoints.cli.calibrate import split
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import InvalidValueError
from vllm_omni.modular import whole
from vllm_omni.quality.calibrate import cache_of, calibrate, enabled, judge, latents, measured, sha256_of
from vllm_omni.quality.pairs import read_prompts
from vllm_omni.trials import Away, Measurement, Trial, planned
from vllm_omni.tuning import tuned_weights

HELD_OUT = ["c", "cc", "ccc", "cccc", "c c"]
CAPTIONS = ["red apple", "penguin", "rocket", "banana", "guitar", "octopus", "teapot", "whale", "pizza", "snowman"]


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
@pytest.mark.parametrize("there", [True, False])
def test_a_calibration_that_is_cut_short_keeps_what_is_worth_most(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out = tmp_path / "made.json"
    if there:
        out.write_bytes(made.read_bytes())

    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_omni.quality.calibrate.judge", cut)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:2]))
    command = f"calibrate demo --dtype float32 --steps 8 --seed 5 --prompts {tmp_path}/prompts.txt --out {out}"
    assert main(command.split()) == 130
    assert load_profile(out).has_figures == there and load_profile(out).gram is not None


@pytest.mark.slow
def test_the_calibrated_profile_records_its_provenance(made: Path) -> None:
    profile = load_profile(made)
    said = profile.provenance
    assert len(profile.ratios) == 8 and profile.gram is not None
    assert said["steps"] == 8 and said["arguments"]["height"] == said["arguments"]["width"] == 64
    assert said["prompts"] == 4 and said["prompts_sha256"] == sha256_of(CAPTIONS[0::2][:4])  # the last is to tune on
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
    assert judged["prompts"] == 5 and judged["prompts_sha256"] == sha256_of(CAPTIONS[1::2])
    assert [round(8 / budget.speedup) for budget in profile.budgets] == [6, 5, 4, 3, 2]
    for budget in profile.budgets:
        assert budget.pairs == 5 and budget.terms is not None
        assert budget.psnr is not None and budget.psnr_mean is not None and budget.rule_psnr is not None
        assert budget.rule_psnr - 1 < budget.psnr <= budget.psnr_mean
    assert profile.lacks == []


@pytest.mark.slow
def test_tuned_weights_end_nearer_on_prompts_that_did_not_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By decibels, in the mean, where two thirds of the steps are skipped, and the planner was told what is not so."""
    monkeypatch.setattr("vllm_omni.trials.SPEEDUPS", (28 / 9,))
    wrong = tuple(tuple(0.9 ** abs(i - j) for j in range(28)) for i in range(28))
    profile = named_profile("demo").model_copy(update={"budgets": (), "output_gram": wrong})
    pipeline = load_pipeline(OmniDiffusionConfig(model="demo", dtype="float32"))
    arguments = profile.provenance["arguments"]
    tuned = measured(tuned_weights(profile, 3), pipeline, ("rocket", "strawberry", "snail"), 11, arguments)
    assert tuned.tuned and tuned.budgets[0].terms and len(tuned.budgets[0].terms) == 19
    unseen = ("violin", "tiger", "castle", "honeybee")
    trials = [Trial(i, planned(one, 9), picture=True) for i in range(len(unseen)) for one in (profile, tuned)]
    compared = Measurement("runs", tuple(trials), lambda away: [one.decibels for one in away])
    before, after = np.array(measured(compared, pipeline, unseen, 77, arguments)).reshape(-1, 2).mean(axis=0)
    assert after > before + 2


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
    profile = judge(pipe, profile, ["a"], HELD_OUT, 9, num_inference_steps=6, height=32, width=32)
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


@pytest.mark.parametrize("steps", [None, 7])
def test_fewer_steps_are_as_many_forwards_with_a_scheduler_of_second_order(steps: int | None) -> None:
    pipe, counted = tiny_wan(), []
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.transformer.register_forward_pre_hook(lambda *_: counted.append(1))
    arguments: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0}
    arguments |= {} if steps is None else {"num_inference_steps": steps}
    whole = 2 * (steps or 50) - 1
    trials = (Trial(0, None, whole // 3, picture=True),)
    measured(Measurement("fewer", trials, len), pipe, ["a"], 0, arguments)
    assert abs(len(counted) - whole - whole // 3) <= 1


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


def test_a_sketch_keeps_products_of_what_is_signed_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of residuals that are alike everywhere, whose pieces would add up if they had the same signs."""
    monkeypatch.setattr("vllm_omni.diffusion.cache.calibration.PIECES", 2)
    draw = torch.Generator().manual_seed(1)
    one = torch.randn(1, 1, 4000, generator=draw).expand(1, 64, 4000) + 0.1 * torch.randn(1, 64, 4000, generator=draw)
    two = one + 0.3 * torch.randn(1, 64, 4000, generator=draw)
    sketches = torch.stack([sketch(x) for x in (one, two, two - one)]).double()
    exact = torch.stack([x.double().flatten() for x in (one, two, two - one)]) / (64 * 4000) ** 0.5
    assert torch.allclose((sketches @ sketches.T).diag(), (exact @ exact.T).diag(), rtol=0.12)


def test_a_pipeline_whose_first_argument_is_no_prompt_is_measured() -> None:
    pipe = flux2()
    shape = (1, 8, pipe.transformer.config.joint_attention_dim)

    def encoded(prompt: str, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randn(shape, generator=torch.Generator().manual_seed(len(prompt)))
        return text, pipe._prepare_text_ids(text)

    vars(pipe)["encode_prompt"] = encoded
    profile = calibrate(pipe, ["a", "bb"], "new", num_inference_steps=4, height=32, width=32)
    assert profile.transformer_class == "Flux2Transformer2DModel" and profile.gains is not None
    profile = judge(pipe, profile, ["a"], HELD_OUT, 9, num_inference_steps=4, height=32, width=32)
    assert profile.budgets and all(budget.psnr is not None for budget in profile.budgets)


def test_a_modular_pipeline_is_measured() -> None:
    pipe, sizes = whole(flux3()), {"num_inference_steps": 4, "height": 64, "width": 64}
    profile = calibrate(pipe, ["a red apple", "a b"], "new", **sizes, text_encoder_out_layers=(0, 1))
    assert profile.transformer_class == "Flux3Transformer2DModel" and profile.gains is not None


@pytest.mark.parametrize("component", ["transformer", "unet"])
def test_a_pipeline_of_ones_own_is_measured_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], component: str
) -> None:
    """The one in the documentation, whose call has no `return_dict`."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/any_model.md").read_text(), re.DOTALL)[0]
    code, module = code.replace("transformer", component), f"ones_own_{component}"
    make = "return Pipeline(Denoiser().eval(), FlowMatchEulerDiscreteScheduler())"
    (tmp_path / f"{module}.py").write_text(f"{code}\ndef make():\n    torch.manual_seed(0)\n    {make}\n")
    (tmp_path / "prompts.txt").write_text("bark\nmoss\nfern\nleaf\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["calibrate", f"{module}:make", "--prompts", str(tmp_path / "prompts.txt"), "--out", f"{tmp_path}/own.json"]
    assert main([*words, "--steps", "4"]) == 0
    profile = load_profile(tmp_path / "own.json")
    assert profile.name == f"{module}:make" and len(profile.ratios) == 4 and profile.budgets
    assert main([*words, "--extra", '{"num_inference_steps": 4}']) == 2
    assert main([*words, "--extra", '{"frames": 4}']) == 2
    told = capsys.readouterr()
    first, second = [line for line in told.err.splitlines() if line.startswith("vllm-omni")]
    assert "decibels: that needs 10 prompts at least, and --limit 5." in told.out
    assert "--extra holds what the command itself gives; leave that out, got 'num_inference_steps'" in first
    assert "the pipeline raised TypeError" in second and "'frames'" in second


@pytest.mark.parametrize(("make", "needs"), [(qwen_edit, "image"), (wan_i2v, "image")])
def test_a_pipeline_that_needs_a_picture_is_refused_with_another_way(make: Any, needs: str) -> None:
    with pytest.raises(InvalidValueError, match=f"MODEL needs {needs} beside a prompt; .*calibrate='auto'"):
        calibrate(make(), ["a", "bb"], "new")


def test_a_name_or_a_file_that_cannot_be_saved_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, told in (
        (["--name", "a/b"], "--name must have 1 to 200 bytes, and no '/'"),
        (["--name", ""], "--name must have 1 to 200 bytes"),
        (["--name", "é" * 101], "--name must have 1 to 200 bytes"),
        (["--out", f"{tmp_path}/x.txt"], "--out must end in .json"),
    ):
        assert main(["calibrate", "demo", *words]) == 2
        assert told in capsys.readouterr().err


def test_a_profile_of_this_folder_has_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "vllm_omni/assets/demo")
    for here in (".", "./"):
        out = tmp_path / "here.json"
        assert main(["calibrate", here, "--steps", "2", "--limit", "1", "--size", "32x32", "--out", str(out)]) == 0
        assert load_profile(out).name == "demo" and "figures" in load_profile(out).lacks


def test_every_other_prompt_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join("abcdefg"))
    lines = read_prompts(file)
    kept, held_out = split(lines)
    assert kept == list("aceg") and held_out == list("bdf")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_are_read_from_any_file(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("été\n\n red apple \n", encoding=encoding)
    assert read_prompts(file) == ["été", "red apple"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(file.read_bytes(),))
    writer.start()
    assert read_prompts(pipe) == ["été", "red apple"]
    writer.join()


def test_prompts_that_cannot_be_read_are_said_to_be_so(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / encoding).write_text("été", encoding=encoding)
        with pytest.raises(InvalidValueError, match="--prompts must be a text file in UTF-8"):
            read_prompts(tmp_path / encoding)
    with pytest.raises(InvalidValueError, match=r"--prompts must be a text file .* \(Is a directory\)"):
        read_prompts(tmp_path)


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
    kept, held_out = split(read_prompts(root / "assets/demo/captions.txt"))
    assert said["prompts_sha256"] == sha256_of(kept[: said["prompts"]])
    assert said["held_out"]["prompts"] >= 64
    assert said["held_out"]["prompts_sha256"] == sha256_of(held_out[: said["held_out"]["prompts"]])
