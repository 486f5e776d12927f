"""What every run of the tests leaves out of the ranks': minutes more on two cores, where each rank is a process."""

from __future__ import annotations

import os

import pytest

full_set = pytest.mark.skipif(os.environ.get("VLLM_OMNI_RANKS") != "all", reason="the full set: VLLM_OMNI_RANKS=all")
