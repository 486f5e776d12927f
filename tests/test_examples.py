"""The examples and the demo, each run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline
from lanes import lane
from paths import ROOT
from PIL import Image
from pipelines import DEMO, tiny_wan
from zoo_sound import cosmos3

MAX_EXAMPLE_LINES = 40
PICTURES = {
    "offline_generation": ["birthday_cake", "penguin", "red_apple"],
    "mixed_requests": ["0_rocket", "1_rocket", "2_banana", "3_octopus", "4_sunflower", "5_panda_face"],
    "magcache_on_diffusers": ["hamburger_magcache", "hamburger_plain"],
    "async_generation": ["cat_face", "guitar"],
}
MODELS = ("edit", "video")  # of a folder that the user gives
JSON_KEYS = [
    "images",
    "nfe_uncached",
    "nfe_cached",
    "seconds_uncached",
    "seconds_cached",
    "speedup",
    "psnr_cached_db",
    "psnr_fewer_steps_db",
    "max_isolation_error",
    "grid",
]


def run(script: str, *arguments: str) -> str:
    """What the script writes to stdout; its stderr too where it fails."""
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{script} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_is_tested_short_and_explained() -> None:
    found = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "examples").glob("*.py")}
    assert set(found) == {*PICTURES, *MODELS}
    for name, text in found.items():
        assert len(text.splitlines()) <= MAX_EXAMPLE_LINES, name
        assert text.startswith('"""'), name


@pytest.mark.slow
@pytest.mark.parametrize("name", lane(sorted(PICTURES), lambda name: name == "offline_generation"))
def test_example_writes_its_pictures(name: str, tmp_path: Path) -> None:
    stdout = run(f"examples/{name}.py", "--out", str(tmp_path))
    assert "skipped" in stdout
    assert sorted(file.stem for file in tmp_path.glob("*.png")) == PICTURES[name]
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            assert picture.size == (64, 64)
            assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 50, f"{file} is flat"


@pytest.mark.slow
def test_example_edits_a_picture(tmp_path: Path) -> None:
    demo = DiffusionPipeline.from_pretrained(DEMO, dtype=torch.float32, use_safetensors=True)
    FluxImg2ImgPipeline(**demo.components).save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "in.png")
    given = (str(tmp_path / "model"), str(tmp_path / "in.png"), "banana", "--steps", "8", "--out", str(tmp_path))
    assert "steps computed" in run("examples/edit.py", *given)
    first, second = (Image.open(tmp_path / f"in_{seed}.png").convert("RGB") for seed in (1, 2))
    assert max(high - low for low, high in first.getextrema()) > 50 and first.tobytes() != second.tobytes()


@pytest.mark.slow
def test_example_makes_a_video(tmp_path: Path) -> None:
    import imageio.v3 as imageio

    tiny_wan().save_pretrained(tmp_path / "model")
    given = ("--size", "32x32", "--frames", "5", "--steps", "3", "--cache-backend", "none", "--out", str(tmp_path))
    assert "3 steps computed" in run("examples/video.py", str(tmp_path / "model"), "a rocket", *given)
    assert imageio.imread(tmp_path / "video.mp4", plugin="FFMPEG").shape == (5, 32, 32, 3)


@pytest.mark.slow
def test_the_video_of_the_example_has_its_sound(tmp_path: Path) -> None:
    import imageio_ffmpeg

    cosmos3().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"enable_sound": True}))
    given = ("--size", "32x32", "--frames", "5", "--steps", "2", "--cache-backend", "none", "--out", str(tmp_path))
    run("examples/video.py", str(tmp_path / "model"), "a rocket", *given)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "video.mp4")]
    assert "Audio: aac" in subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.slow
def test_demo_draws_and_ends_with_its_json_line(tmp_path: Path) -> None:
    result = json.loads(run("tools/demo.py", "--quick", "--out", str(tmp_path)).splitlines()[-1])
    assert list(result) == JSON_KEYS
    assert result["images"] == 4
    assert result["nfe_uncached"] == 28
    assert 0 < result["nfe_cached"] < result["nfe_uncached"]
    assert result["max_isolation_error"] <= 1 / 255
    assert result["psnr_cached_db"] > result["psnr_fewer_steps_db"]
    assert result["grid"] == str(tmp_path / "grid.png")
    for name in ("grid.png", "steps.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600


def test_demo_prompts_are_captions_of_the_model() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from demo import QUICK, STEPS_OF_PROMPTS
    finally:
        sys.path.pop(0)
    captions = (ROOT / "vllm_omni/assets/demo/captions.txt").read_text(encoding="utf-8").splitlines()
    assert not {*QUICK, *STEPS_OF_PROMPTS} - set(captions)
    assert len(STEPS_OF_PROMPTS) >= 12
    assert min(STEPS_OF_PROMPTS.values()) == 10
    assert max(STEPS_OF_PROMPTS.values()) == 50


def test_the_demos_help_explains_its_output() -> None:
    stdout = run("tools/demo.py", "--help")
    assert all(word in stdout for word in ("grid.png", "steps.png", "--quick", "--out", "max_isolation_error"))
