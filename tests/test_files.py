"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_omni.files import write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "one.json"
    for text in (b"long before", b"short"):
        write_whole(path, lambda to, text=text: to.write(text))
        assert path.read_bytes() == text and path.stat().st_mode & 0o777 == 0o644
    assert [*path.parent.iterdir()] == [path]


def test_what_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(b"before")

    def half(to: Any) -> None:
        to.write(b"ha")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_whole(path, half)
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]
