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


def test_the_tour_names_what_exists() -> None:
    """Its answers name files, and functions or classes that these define; its fifteen words name files."""
    tour = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    words, answers = (part.splitlines() for part in tour.split("## Glossary")[1].split("## Where is X done?"))
    words, answers = ([row for row in rows if row.startswith("| ") and "`" in row] for rows in (words, answers))
    assert (len(words), len(answers)) == (15, 16)
    sources = {str(file): file.read_text(encoding="utf-8") for file in (ROOT / "vllm_omni").rglob("*.py")}
    for row in words + answers:
        quoted = re.findall("`([^`]+)`", row)
        files = [[file for file in sources if file.endswith(f"/{name}")] for name in quoted if name.endswith(".py")]
        assert files and all(len(found) == 1 for found in files), f"{files} in: {row}"
        if row in answers:
            defined = "\n".join(sources[file] for [file] in files)
            names = {part for name in quoted if not name.endswith(".py") for part in name.split(".")} - {"cache"}
            missing = [name for name in names if not re.search(rf"(?:def|class) {name}\b", defined)]
            assert names and not missing, f"{missing} in: {row}"


def test_every_test_file_says_what_it_shows() -> None:
    silent = [str(file.relative_to(ROOT)) for file in TESTS if not file.read_text(encoding="utf-8").startswith('"""')]
    assert len(NAMES) > 300 and not silent
