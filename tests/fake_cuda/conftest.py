"""The fake devices for the tests of this folder; where they cannot be built, the tests are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
