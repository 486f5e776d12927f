"""Fixtures of tests in which a model is learnt: one in a folder, and profiles that are nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX with random weights, saved."""
    from pipelines import save_tiny_flux

    return save_tiny_flux(tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's profiles are kept."""
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"
