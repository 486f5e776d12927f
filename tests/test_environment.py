"""What the environment of an engine's process is given beside what its operator has set."""

from __future__ import annotations

import pytest

from vllm_omni.envs import grow_segments


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_grow_unless_the_operator_has_set_the_allocator(name: str) -> None:
    environment = {"PATH": "/bin"}
    grow_segments(environment)
    assert environment == {"PATH": "/bin", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    own = {name: "max_split_size_mb:64"}
    grow_segments(own)
    assert own == {name: "max_split_size_mb:64"}
