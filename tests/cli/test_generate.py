"""`vllm-omni generate` writes what is finished, over nothing, and says what it could not write."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from PIL import Image
from pipelines import tiny_wan
from waiting import until

from vllm_omni.entrypoints.cli.main import main

COMMAND = [sys.executable, "-m", "vllm_omni", "generate", "demo"]
QUICK = ["--steps", "2", "--seed", "1"]


def test_no_earlier_picture_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "demo", "red apple", *QUICK, "-n", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(first) == ["000-red-apple-1.png", "000-red-apple.png"]
    assert main([*words, "--seed", "7"]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert {file.name for file in tmp_path.iterdir()} - {*first} == {"000-red-apple-2.png", "000-red-apple-3.png"}
    assert "000-red-apple-2.png" in capsys.readouterr().out


def test_a_name_keeps_the_letters_of_its_prompt(tmp_path: Path) -> None:
    prompts = ["Été à la mer!", "红苹果", "हिन्दी", "?!"]
    assert main(["generate", "demo", *prompts, *QUICK, "--out", str(tmp_path)]) == 0
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["000-été-à-la-mer.png", "001-红苹果.png", "002-हिन्दी.png", "003-picture.png"]


def test_a_format_that_cannot_be_written_is_refused_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_wan().save_pretrained(tmp_path / "wan")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    words = ["generate", str(tmp_path / "wan"), "x", "--size", "32x32", "--num-frames", "5", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "--video-format needs imageio" in told.err and "or use gif" in told.err and not told.out
    assert main([*words, "--out", str(tmp_path / "out"), "--video-format", "gif"]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["000-x.gif"]


def test_what_is_wrong_with_an_adapter_is_said_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ink.bin").touch()
    for words, told in (
        (["--lora", "/no/ink.safetensors"], "--lora does not exist; give a file, a folder or a hub id, got '/no/ink"),
        (["--lora", str(tmp_path / "ink.bin")], "--lora is no .safetensors file"),
        (["--lora-scale", "0.5"], "--lora-scale is the scale of --lora, which is not given, got 0.5"),
    ):
        assert main(["generate", "demo", "x", *words, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_file_that_cannot_be_written_does_not_stop_the_next(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    ran = subprocess.run(
        [*COMMAND, "red apple", "penguin", *QUICK, "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=240, cwd=ROOT, preexec_fn=small_files,
    )  # fmt: skip
    told = [line for line in ran.stderr.splitlines() if line.startswith("vllm-omni")]
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert len(told) == 2 and all("could not be written: [Errno 27] File too large" in line for line in told)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_what_is_finished_at_ctrl_c_is_saved(tmp_path: Path) -> None:
    words = ["red apple", "penguin", "--steps", "900", "--max-num-seqs", "1", "--out", str(tmp_path)]
    words[2:2] = ["rocket"] * 6
    running = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    until(lambda: len([*tmp_path.glob("*.png")]) > 0, 240)
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Traceback" not in error and error.splitlines()[-1] == "vllm-omni generate: interrupted"
    files = [*tmp_path.iterdir()]
    assert 0 < len(files) < 8 and files[0].name in out
    for file in files:
        with Image.open(file) as picture:
            picture.load()
