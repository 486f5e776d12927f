"""How `vllm-omni quality` ends where it cannot go on: one line, and nothing drawn in vain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from paths import DEMO, ROOT

from vllm_omni.entrypoints.cli.main import main
from vllm_omni.quality.bench import Bench, BenchModel
from vllm_omni.quality.metrics import lpips
from vllm_omni.quality.pairs import held_out
from vllm_omni.quality.rows import reference

ASKED = ["--pairs", "1", "--steps", "4", "--settings", '{"nfe": 2}']


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_model_that_does_not_load_is_one_line(
    tmp_path: Path, processes: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DEMO, tmp_path / "torn")
    index = json.loads((tmp_path / "torn/model_index.json").read_text())
    (tmp_path / "torn/model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "NoSuchModel"]}))
    words = ["quality", str(tmp_path / "torn"), *ASKED, "--processes", processes, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and "BrokenThreadPool" not in error
    told = [line for line in error.splitlines() if line.startswith("vllm-omni quality: ")]
    assert len(told) == 1 and "could not be loaded" in told[0] and "NoSuchModel" in told[0]


def test_missing_metrics_are_noticed_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    lpips.cache_clear()
    assert main(["quality", "demo", *ASKED, "--processes", "1", "--out", str(tmp_path)]) == 2
    assert "torchmetrics must be installed" in capsys.readouterr().err
    assert [*(tmp_path / "work").iterdir()] == []


def test_more_arguments_reach_every_picture() -> None:
    """Guidance and a negative prompt, through the engine and through the plain pipeline."""
    pairs, more = held_out("demo", 1), {"true_cfg_scale": 4.0, "negative_prompt": "red apple"}
    drawn = []
    for arguments in ({}, more):
        bench = Bench(BenchModel("demo", "float32", arguments=arguments))
        plain = bench._plain(bench.pipeline, 4, pairs)
        engine, _ = bench.draw(reference(4), pairs)
        assert abs(plain - engine).max() < 0.02
        drawn.append(plain)
        bench.close()
    assert abs(drawn[0] - drawn[1]).max() > 0.1


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ('{"output_type": "pil"}', "--extra holds what the command itself gives; leave that out, got 'output_type'"),
        ("4", "--extra must be a JSON object, e.g. '{\"num_frames\": 33}'"),
        ('{"num_framse": 9}', "FluxPipeline has no 'num_framse'"),
    ],
)
def test_more_arguments_are_checked(tmp_path: Path, extra: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quality", "demo", *ASKED, "--processes", "1", "--out", str(tmp_path), "--extra", extra]
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_is_one_line(tmp_path: Path, processes: str) -> None:
    words = [sys.executable, "-m", "vllm_omni", "quality", "demo", "--processes", processes, "--out", str(tmp_path)]
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert running.stdout is not None and "pairs" in running.stdout.readline()  # now it begins with its processes
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, error = running.communicate(timeout=240)
    assert running.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "vllm-omni quality: interrupted"
