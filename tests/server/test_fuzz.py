"""Requests that schemathesis makes of the server's own description; `stress/http_fuzz.py` asks more."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzzing import MODES, Fuzz
from http_server import AUTH, Running


@pytest.mark.slow
def test_generated_requests_never_break_the_description(server: Running) -> None:
    """Schemathesis, valid and invalid requests of every operation; `stress/http_fuzz.py` asks more."""
    fuzz = Fuzz(server.url, AUTH)
    for mode in MODES:
        fuzz.operations(mode, 8)
    fuzz.sequences(5)
    assert not fuzz.failures, fuzz.failures
    seen = sum(fuzz.statuses.values(), Counter[int]())
    valid = seen[200] + seen[503] + seen[504]  # on a slow machine some are late
    assert seen.total() > 200 and valid > 40 and seen[400] > 40, seen
