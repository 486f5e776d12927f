"""Tests and files that the documentation names exist."""

from __future__ import annotations

import re

import pytest
from paths import ROOT

# The log keeps the names that things had when an entry was written.
PAGES = sorted({*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")} - {ROOT / "docs" / "log.md", ROOT / "CHANGELOG.md"})
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
NAMES = {name for file in TESTS for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_named_in_the_docs_exist(page) -> None:
    """`test_begin…` stands for every test that begins so."""
    quoted = re.findall(r"`(?:[\w/]+/)?(test_\w+(?:…|\.py)?)`", page.read_text(encoding="utf-8"))
    missing = []
    for name in quoted:
        if name.endswith(".py"):
            found = any(file.name == name for file in TESTS)
        else:
            found = any(n.startswith(name[:-1]) if name.endswith("…") else n == name for n in NAMES)
        if not found:
            missing.append(name)
    assert not missing, f"{page.name} names tests that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_the_docs_exist(page) -> None:
    folders = "vllm_omni|tests|tools|docs|benchmarks|examples|requirements|csrc"
    quoted = re.findall(rf"`((?:{folders})/[\w./-]*)", page.read_text(encoding="utf-8"))
    missing = sorted({path for path in quoted if not (ROOT / path).exists()})
    assert not missing, f"{page.name} names files that do not exist: {missing}"


def test_every_test_file_says_what_it_shows() -> None:
    silent = [str(file.relative_to(ROOT)) for file in TESTS if not file.read_text(encoding="utf-8").startswith('"""')]
    assert len(NAMES) > 300 and not silent
