"""A Dockerfile copies what its build needs: each COPY source exists, is not ignored, and none is missing."""

from __future__ import annotations

import fnmatch
import re

from paths import ROOT

NEEDED = {"pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "vllm_omni"}


def copied() -> set[str]:
    """The sources of all COPY lines that come from the context."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    return {source for *sources, _ in lines for source in sources}


def test_the_image_gets_what_its_build_needs() -> None:
    sources = copied()
    assert sources >= NEEDED, NEEDED - sources
    missing = [source for source in sources if not (ROOT / source).exists()]
    assert not missing, missing


def test_the_context_holds_what_is_copied() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    hidden = [s for s in copied() if not any(fnmatch.fnmatch(a, s) or a.startswith(f"{s}/") for a in allowed)]
    assert not hidden, hidden
