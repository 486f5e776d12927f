"""The store of videos and their jobs on disk: expiry, cleaning up, and folders that are no store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_omni.entrypoints.openai.store import EXPIRES_S, VideoStore
from vllm_omni.errors import InvalidValueError


def _add(store: VideoStore, **change: Any) -> Any:
    given = {"model": "m", "prompt": "p", "seconds": "4", "size": "32x32", "fields": {"seed": 1}, "picture": None}
    return store.add(**given | change)


def test_a_video_expires_after_a_day(tmp_path: Path) -> None:
    now = [1000.0]
    store = VideoStore(tmp_path, lambda: now[0])
    done, waiting = _add(store, picture=b"png"), _add(store)
    store.write(done, {"video.mp4": b"mp4"})
    store.ended(done.id, None, {"fps": 8})
    now[0] += EXPIRES_S - 1
    assert store.get(done.id).facts == {"fps": 8} and store.picture(done) == b"png"
    now[0] += 1
    assert store.get(done.id) is None and [job.id for job in store.page(None, 9, True)] == [waiting.id]
    (tmp_path / "video_mine").mkdir()  # not one of ours
    store.sweep()
    assert {path.name for path in tmp_path.glob("video_*")} == {"video_mine"}
    now[0] += 10 * EXPIRES_S
    assert store.unfinished() == [waiting]


def test_a_temporary_store_leaves_nothing() -> None:
    store = VideoStore(None)
    job = _add(store, picture=b"png")
    assert store.folder.stat().st_mode & 0o077 == 0 and (store.folder / job.id).is_dir()
    store.close()
    assert not store.folder.exists()


@pytest.mark.parametrize("content", [None, "not a table"])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "store").write_text("a file")
    else:
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "videos.sqlite3").write_text(content * 1000)
    with pytest.raises(InvalidValueError, match="store_dir"):
        VideoStore(tmp_path / "store")
