"""Shared fixtures. The environment comes first: torch and its OpenMP runtime read it once, when they are imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "VLLM_OMNI_PROFILES" not in os.environ:  # what tests find out about models is nobody's but theirs
    os.environ["VLLM_OMNI_PROFILES"] = tempfile.mkdtemp(prefix="profiles")
    atexit.register(shutil.rmtree, os.environ["VLLM_OMNI_PROFILES"], ignore_errors=True)

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # torch is imported by those tests alone that need it
    from vllm_omni import Omni


NO_TIME = "no time left"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Two moments, in seconds since 1970 (`tools/test.sh`): from when on slow tests are left out, and then all."""
    slow, all_ = (float(os.environ.get(f"VLLM_OMNI_TESTS_{name}", "inf")) for name in ("UNTIL", "END"))
    if time.time() > (slow if item.get_closest_marker("slow") else all_):
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A run says how many it has left out for lack of time."""
    skipped = terminalreporter.stats.get("skipped", [])
    if left := sum(NO_TIME in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{NO_TIME}: {left} left out; bash tools/test.sh without VLLM_OMNI_TESTS_S has all")


@pytest.fixture(scope="module")
def demo() -> Iterator[Omni]:
    """The demo model in this process, with MagCache."""
    from vllm_omni import Omni

    with Omni("demo", dtype="float32", cache_backend="magcache") as omni:
        yield omni


@pytest.fixture
def tiny() -> Iterator[Omni]:
    """A tiny FLUX with random weights and FLUX.1-dev's curve."""
    from pipelines import CURVE, DEFAULTS, tiny_flux

    from vllm_omni import Omni

    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"mag_ratios": CURVE}, defaults=DEFAULTS
    ) as omni:
        yield omni
