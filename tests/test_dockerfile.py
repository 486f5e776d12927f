"""Each Dockerfile copies what its build needs: every COPY source exists, is not ignored, and none is missing."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from paths import ROOT

FILES = sorted(path.name for path in ROOT.glob("Dockerfile*"))
NEEDED = {"pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "vllm_omni"}
EXTRAS = {"Dockerfile": None, "Dockerfile.cuda": "gpu"}  # what is installed; None: the CPU's lock


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its words), lines joined as docker does it."""
    text = "\n".join(line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line[:1] != "#")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)]


def copied(name: str) -> list[tuple[list[str], str]]:
    """(sources, destination) of all COPY lines that come from the context."""
    words = [rest.split() for word, rest in instructions(name) if word == "COPY" and "--from" not in rest]
    return [(sources, destination) for *sources, destination in words]


def test_there_is_one_per_device() -> None:
    assert set(FILES) == EXTRAS.keys()


def runs(name: str) -> str:
    """All that its RUN lines say."""
    return " ".join(rest for word, rest in instructions(name) if word == "RUN")


@pytest.mark.parametrize("name", FILES)
def test_it_is_made_of_instructions(name: str) -> None:
    known = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    found = instructions(name)
    assert found[0][0] == "FROM" and {word for word, _ in found} <= known
    for word, rest in found:
        if word in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(entry, str) for entry in json.loads(rest))
    assert [rest for word, rest in found if word == "USER"] == ["omni"]  # not root


@pytest.mark.parametrize("name", FILES)
def test_the_context_holds_what_is_copied(name: str) -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    sources = [source for own, _ in copied(name) for source in own]
    assert not [source for source in sources if not (ROOT / source).exists()]
    hidden = [s for s in sources if not any(fnmatch.fnmatch(a, s) or a.startswith(f"{s}/") for a in allowed)]
    assert not hidden, hidden


@pytest.mark.parametrize("name", FILES)
def test_the_build_has_all_its_files(name: str, tmp_path: Path) -> None:
    """Walk the COPY lines into a folder: a whole wheel must come from there, without anything else of the checkout."""
    sources = {source for own, _ in copied(name) for source in own}
    assert sources >= NEEDED, NEEDED - sources
    for own, destination in copied(name):
        assert len(own) == 1 or destination.endswith("/")
        for source in own:
            target = tmp_path / (destination if len(own) == 1 else f"{destination}{Path(source).name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "assets", "*.so")
                shutil.copytree(ROOT / source, target, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, target)
    code = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    made = tmp_path / "made"
    made.mkdir()
    command, environment = [sys.executable, "-c", code, str(made)], os.environ | {"VLLM_OMNI_NATIVE": "off"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with zipfile.ZipFile(next(made.glob("vllm_omni_magcache-*.whl"))) as wheel:
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_omni").rglob("*.py")}
        assert not modules - {*wheel.namelist()}
    for path in re.findall(r"(?:requirements|tools)/[\w./-]+", runs(name)):
        assert (tmp_path / path).exists(), path  # what a RUN line reads was copied before


@pytest.mark.parametrize("name", FILES)
def test_what_it_installs_is_offered(name: str) -> None:
    extra = EXTRAS[name]
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if extra is not None:
        assert f".[{extra}" in runs(name)
        pinned = {one.name: str(one.specifier) for one in map(Requirement, offered["optional-dependencies"][extra])}
        assert pinned["torch"].startswith("==") and pinned["vllm"].startswith("==")
    command = json.loads(next(rest for word, rest in instructions(name) if word == "CMD"))
    assert command[0] == "serve" and ("cuda" in command) == (extra == "gpu")
