"""`tools/gpu_check.py` comes to its end on every machine: on a CPU here, and on the fake GPU of `fake_cuda/`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

SMALL = ["--size", "tiny", "--steps", "6", "--rows", "4", "--rounds", "1"]
SECTIONS = {"isolation", "efficiency and tax", "batching", "memory", "peers", "predictions"}
OFFLOADED = ("parts in main memory", "blocks in main memory")


def check(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last line, and the report."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *SMALL, *arguments]
    ran = subprocess.run([*command, "--out", str(folder / "report.json")], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1]), json.loads((folder / "report.json").read_text(encoding="utf-8"))


def found(report: dict[str, Any], model: str, section: str) -> dict[str, Any]:
    return {finding["what"]: finding["value"] for finding in report["models"][model][section]}


@pytest.mark.slow
@pytest.mark.alone
def test_on_a_cpu(tmp_path: Path) -> None:
    line, report = check(tmp_path, "--device", "cpu", "--models", "flux", "wan")
    assert line["failed"] == line["missed"] == [] and line["held"] >= 6 and line["check"] == "gpu"
    for model in ("flux", "wan"):
        assert report["models"][model].keys() >= SECTIONS | {*OFFLOADED}
        launched = found(report, model, "predictions")
        computed = launched["kernels launched per computed step, predicted"]
        assert 0 < launched["kernels launched per skipped step, predicted"] < computed / 2
        assert computed <= launched["kernels launched by plain diffusers per step, predicted"]
    assert str(Path.home()) not in json.dumps(report) and str(ROOT) not in json.dumps(report["models"])


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(os.environ.get("VLLM_OMNI_FAKE_CUDA") != "all", reason="the full set: VLLM_OMNI_FAKE_CUDA=all")
@pytest.mark.usefixtures("fake_gpu_can_be_built")
def test_on_the_fake_gpu(tmp_path: Path) -> None:
    line, report = check(tmp_path, "--device", "fake", "--models", "flux")
    assert line["failed"] == line["missed"] == []
    seen = found(report, "flux", "predictions")
    assert seen["waits of the host on a planned step, ours"] == 0
    assert seen["and the pipeline's, per step"] > 0
    for who in ("by plain diffusers per step", "per computed step", "per skipped step"):
        predicted, real = (seen[f"kernels launched {who}, {by}"] for by in ("predicted", "on the device"))
        assert real == pytest.approx(predicted, rel=0.35)
    for section in OFFLOADED:
        offloaded = found(report, "flux", section)
        assert offloaded["of them bit by bit"] and offloaded["peak of two that overlap, less a row, / of one"] > 0
    assert found(report, "flux", OFFLOADED[0])["parts on the device at once"] == 1
    short = [what for what in found(report, "flux", "memory") if "failed of 4 with the cache" in what]
    assert len(short) == 1


@pytest.fixture
def fake_gpu_can_be_built() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import fake_cuda

    try:
        fake_cuda.library()
    except fake_cuda.CannotBuildError as error:
        pytest.skip(f"no fake CUDA device: {error}")


def test_what_cannot_run_is_said_before_anything_loads(tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "gpu_check.py")
    command = [sys.executable, script, "--device", "tpu", "--out", str(tmp_path / "report.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and "must be 'cuda', 'cuda:N', 'cpu' or 'fake'" in ran.stderr
    assert not (tmp_path / "report.json").exists()
