"""`python -m vllm_omni.collect_env`, and packages beside ours that clash with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import run

from vllm_omni import packages
from vllm_omni.collect_env import report, usable_cores
from vllm_omni.driver import architecture_problem, device_problem


def _fake(folder: Path, name: str, cuda: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (folder / name / "version.py").write_text(f"__version__ = '0.28.0'\ncuda = {cuda}\n")


def test_broken_torchvision_is_hidden(tmp_path: Path) -> None:
    for name in packages.UNLOADABLE_WITH_CPU_TORCH:
        _fake(tmp_path, name, "'13.0'")
    _fake(tmp_path, "torch", "None")
    code = (
        "from importlib.util import find_spec; from vllm_omni import packages; print(packages.hide_unloadable());"
        f"assert all(find_spec(name) is None for name in {packages.UNLOADABLE_WITH_CPU_TORCH!r})"
    )
    ran = run([sys.executable, "-c", code], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(list(packages.UNLOADABLE_WITH_CPU_TORCH))


def test_matching_builds_of_torchvision_are_kept(tmp_path: Path) -> None:
    _fake(tmp_path, "torch", "'13.0'")
    _fake(tmp_path, "torchvision", "'13.0'")
    ran = run([sys.executable, "-c", "from vllm_omni import packages; print(packages.hide_unloadable())"], tmp_path)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_a_rival_and_broken_builds_are_reported(tmp_path: Path) -> None:
    _fake(tmp_path, "torchvision", "'13.0'")
    _fake(tmp_path, "torch", "None")
    rival = tmp_path / "vllm_omni-0.30.0.dist-info"
    rival.mkdir()
    (rival / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-omni\nVersion: 0.30.0\n")
    ran = run([sys.executable, "-m", "vllm_omni.collect_env"], tmp_path)
    assert ran.returncode == 1, ran.stderr
    assert "problem: vllm-omni 0.30.0 is installed beside" in ran.stdout
    assert "pip uninstall -y torchvision" in ran.stdout


def test_this_machine_is_reported() -> None:
    facts = report().facts
    assert facts["torch"].startswith("2.") and facts["greenlet"] and facts["device"] and facts["native ops"]
    assert facts["cores"].split()[0] == str(usable_cores())
    assert facts["will run on"].startswith(("cpu, float32", "cuda, bfloat16"))
    assert "OMP_NUM_THREADS" in facts["threads"]


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000\n", 1), ("50000 100000", 1), ("max 100000", None)])
def test_cores_are_those_of_the_container(quota: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cores(tmp_path / "cpu.max") == (cores or usable_cores(tmp_path / "none"))


@pytest.mark.parametrize(
    ("built", "driver", "available", "said"),
    [
        (None, None, False, None),
        ("13.0", (13, 0), True, None),
        (None, (12, 8), False, "there is a driver for CUDA 12.8, but torch is a CPU build"),
        ("13.0", (12, 8), False, "torch is built for CUDA 13.0, but the driver runs 12.8 and older"),
        ("12.9", (12, 8), False, "finds no device behind the driver"),
        ("13.0", None, False, "there is no driver"),
    ],
)
def test_an_accelerator_that_is_not_used(
    built: str | None, driver: tuple[int, int] | None, available: bool, said: str | None
) -> None:
    problem = device_problem(built, driver, available)
    assert problem is None if said is None else problem is not None and said in problem


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # kernels of 8.0 run on 8.9
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_75", "compute_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled at its start
        ((12, 0), ["sm_90", "sm_100"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120"], True),
    ],
)
def test_a_device_that_torch_has_no_kernels_for_is_told(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    problem = architecture_problem(1, capability, built)
    assert (problem is None) == runs
    assert problem is None or f"cuda:1 has capability {capability[0]}.{capability[1]}" in problem
