"""The store of videos and their jobs on disk: expiry, cleaning up, and folders that are no store."""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_omni.entrypoints.openai import jobs
from vllm_omni.entrypoints.openai.store import EXPIRES_S, VideoStore
from vllm_omni.errors import InvalidValueError, StoreError


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


def test_a_job_that_is_gone_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted, expired, or still to be deleted; of the oldest, places are forgotten."""
    now = [1000.0]
    store = VideoStore(tmp_path, lambda: now[0])
    jobs = [_add(store) for _ in range(5)]
    ids = [job.id for job in jobs]
    for index in (0, 2):
        store.remove(ids[index])
    store.ended(ids[4], None, {})
    now[0] += EXPIRES_S
    for _ in range(2):
        assert [store.number(job_id) for job_id in ids] == [1, 2, 3, 4, 5] and store.number("video_x") is None
        assert [job.id for job in store.page(store.number(ids[2]), 9, True)] == [ids[1]]
        assert [job.id for job in store.page(store.number(ids[2]), 9, False)] == [ids[3]]
        store.sweep()
    monkeypatch.setattr("vllm_omni.entrypoints.openai.store.REMEMBERED", 2)
    store.remove(ids[1])
    assert [store.number(job_id) for job_id in ids] == [None, 2, None, 4, 5]


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


COLUMNS = "id, created_at, model, prompt, seconds, size, fields, status, error"
ROW = f"INSERT INTO jobs ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
GOOD = ("video_" + "a" * 32, 1, "m", "p", "4", "32x32", '{"seed": 1}', "queued", None)


def changed(**change: Any) -> tuple[Any, ...]:
    return tuple((dict(zip(COLUMNS.split(", "), GOOD, strict=True)) | change).values())


@pytest.mark.parametrize("row", [
    changed(id="../../etc"), changed(id="video_x"), changed(id=7), changed(fields="{"), changed(fields="[1]"),
    changed(fields="[" * 5000), changed(status="odd"), changed(created_at="x"), changed(prompt=b"\xff\xfe\0"),
    changed(error='{"a": 1}'), changed(error="7"), changed(size=b"\xff"), changed(fields=b"\xff"),
], ids=lambda row: str(row)[:60])  # fmt: skip
def test_a_foreign_row_costs_one_line(tmp_path: Path, row: tuple[Any, ...], caplog: pytest.LogCaptureFixture) -> None:
    store = VideoStore(tmp_path)
    mine = _add(store)
    store.close()
    with closing(sqlite3.connect(tmp_path / "videos.sqlite3", isolation_level=None)) as table:
        table.execute(ROW, row)
    caplog.set_level("WARNING")
    store = VideoStore(tmp_path)
    for _ in range(3):
        for found in (store.unfinished(), store.page(None, 9, True)):
            assert mine.id in [job.id for job in found]
        store.get(str(row[0]))
        store.sweep()
    assert len([r for r in caplog.records if "passed over" in r.message]) == (0 if store.get(str(row[0])) else 1)


def test_another_versions_table_is_refused_in_one_line(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "videos.sqlite3")) as table:
        table.execute("CREATE TABLE jobs (number INTEGER, id TEXT, colour TEXT)")
    with pytest.raises(InvalidValueError, match="another version") as caught:
        VideoStore(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_table_is_refused_in_one_line(tmp_path: Path) -> None:
    store = VideoStore(tmp_path)
    for _ in range(500):
        _add(store, prompt="x" * 500)
    store.close()
    file = tmp_path / "videos.sqlite3"
    data = bytearray(file.read_bytes())
    data[4096:] = b"\xa5" * len(data[4096:])
    file.write_bytes(data)
    with pytest.raises(InvalidValueError, match="store_dir"):
        VideoStore(tmp_path)


@contextmanager
def full(store: VideoStore) -> Iterator[None]:
    """No page more, and no byte of a file more, as on a full disk."""
    (pages,) = store._table.execute("PRAGMA page_count").fetchone()
    store._table.execute(f"PRAGMA max_page_count = {pages}")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        store._table.execute("PRAGMA max_page_count = 1073741823")


def test_a_full_disk_loses_no_end_and_no_deletion(tmp_path: Path) -> None:
    store = VideoStore(tmp_path)
    done, failed, gone, left = (_add(store, picture=b"png") for _ in range(4))
    with full(store):
        with pytest.raises(StoreError, match="store of videos cannot be used"):
            _add(store, picture=b"png" * 1000)
        with pytest.raises(StoreError):
            _add(store, prompt="x" * 30_000)
        with pytest.raises(StoreError):
            store.write(done, {"video.mp4": b"x" * 10_000})
        store.begun(done.id)
        store.ended(done.id, None, {"fps": 8})
        error = {"message": "m", "type": "t", "param": None, "code": "c"}
        store.ended(failed.id, error, {})
        store.remove(gone.id)
        assert store.get(done.id).status == "completed" and store.get(failed.id).error.code == "c"
        assert store.get(gone.id) is None and not (tmp_path / gone.id).exists() and store.get(left.id) == left
        assert len(store.page(None, 9, True)) == 3
    assert len([*tmp_path.glob("video_*")]) == 2, "what could not be written whole is not there"
    store.sweep()
    store.close()
    again = VideoStore(tmp_path)
    assert again.get(done.id).status == "completed" and again.get(failed.id).status == "failed"
    assert again.get(gone.id) is None and again.unfinished() == [left]


async def test_the_sweeper_outlives_every_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SWEEP_EVERY_S", 0.01)
    store = VideoStore(tmp_path)
    async with jobs.VideoJobs(None, store, None) as running:
        with full(store):
            await asyncio.sleep(0.05)
        shutil.rmtree(tmp_path)
        await asyncio.sleep(0.05)
        assert not running._sweeper.done()
