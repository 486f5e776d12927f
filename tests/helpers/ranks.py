"""What every run of the tests leaves out of the ranks': minutes more on two cores, where each rank is a process."""

from __future__ import annotations

import os

import pytest

ALL = os.environ.get("VLLM_OMNI_RANKS") == "all"
full_set = pytest.mark.skipif(not ALL, reason="the full set: VLLM_OMNI_RANKS=all")
