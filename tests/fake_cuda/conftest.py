"""The fake devices for the tests of this folder; where they cannot be built, the tests are skipped with the reason.

The core set runs with all other tests. The rest, every family and every limit, takes minutes more and runs by
`bash tools/test.sh --gpu`, or with `VLLM_OMNI_FAKE_CUDA=all` in the environment of pytest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("VLLM_OMNI_FAKE_CUDA") == "all":
        return
    for item in items:
        if item.path.parent == FOLDER and item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason="the full set: VLLM_OMNI_FAKE_CUDA=all"))


@pytest.fixture
def cuda() -> Iterator[None]:
    """Two fake CUDA devices, for the time of the test."""
    import fake_cuda

    try:
        fake_cuda.library()
    except fake_cuda.CannotBuildError as error:
        pytest.skip(f"no fake CUDA device: {error}")
    with fake_cuda.installed():
        yield
