"""Video jobs on disk: one table, and a folder of files for each. Knows no engine and no HTTP.

A folder belongs to one server at a time. Ids are drawn here; nothing that a client sends ever becomes part of a path.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_omni.entrypoints.openai.protocol.replies import VideoRecord
from vllm_omni.errors import InvalidValueError, StoreError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

EXPIRES_S = 24 * 3600
REMEMBERED = 10_000  # rows that are gone, whose places in the order of creation are still known
FILES = {"video": "video.mp4", "thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}
_INPUT = "input.png"
_SCHEMA = """CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created_at INTEGER NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, seconds TEXT NOT NULL, size TEXT NOT NULL, fields TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'queued', completed_at INTEGER, expires_at INTEGER, error TEXT, facts TEXT)"""
_AS_JSON = ("fields", "error", "facts")


_ID = re.compile("video_[0-9a-f]{32}")


@contextmanager
def usable() -> Iterator[None]:
    """StoreError for a disk that is full, a folder that cannot be written, a table that is broken."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(f"the store of videos cannot be used ({why})") from None


class VideoJob(VideoRecord):
    """A row. `fields` make the same video again; `facts` say how the video was made."""

    fields: dict[str, Any]
    facts: dict[str, Any] = Field(default_factory=dict)


class VideoStore:
    """`folder` is made where it does not exist; None is a private one that `close` removes.

    InvalidValueError if the folder cannot be used, or another server has it open. `now` returns seconds since 1970.
    """

    def __init__(self, folder: Path | None, now: Callable[[], float] = time.time) -> None:
        self._private = tempfile.TemporaryDirectory(prefix="vllm-omni-videos-") if folder is None else None
        self.folder = Path(self._private.name) if self._private else Path(folder or "").expanduser()
        self._now = now
        self._late: dict[str, dict[str, Any]] = {}  # what could not be written of a job; nothing: it is to be deleted
        self._broken: set[str] = set()  # rows that are no jobs of this version
        self._gone: dict[str, int] = {}  # numbers of the last rows that were deleted
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._table = sqlite3.connect(self.folder / "videos.sqlite3", timeout=0, isolation_level=None)
            self._table.execute("PRAGMA locking_mode = EXCLUSIVE")  # kept until the connection or the process ends
            self._table.execute("PRAGMA journal_mode = WAL")
            self._table.execute("PRAGMA synchronous = NORMAL")
            self._table.text_factory = partial(str, encoding="utf-8", errors="replace")
            self._table.execute(_SCHEMA)
            columns = {row[1] for row in self._table.execute("PRAGMA table_info(jobs)")}
            if columns != {*VideoJob.model_fields, "number"}:
                raise sqlite3.Error("its table is another version's")
            self._table.execute("UPDATE jobs SET status = 'queued' WHERE status = 'in_progress'")
            self.sweep()
            self.unfinished()
        except (OSError, sqlite3.Error, StoreError) as error:
            raise InvalidValueError(
                "store_dir", str(folder), f"must be a folder to write to, of this server alone ({error})"
            ) from None

    def add(
        self, *, model: str, prompt: str, seconds: str, size: str, fields: dict[str, Any], picture: bytes | None
    ) -> VideoJob:
        """A new job, queued; `picture` is the PNG that its video begins with."""
        job = VideoJob(
            id=f"video_{secrets.token_hex(16)}", created_at=int(self._now()),
            model=model, prompt=prompt, seconds=seconds, size=size, fields=fields,
        )  # fmt: skip
        if picture is not None:
            self.write(job, {_INPUT: picture})
        try:
            self._execute(
                "INSERT INTO jobs (id, created_at, model, prompt, seconds, size, fields) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.created_at, model, prompt, seconds, size, json.dumps(fields)),
            )
        except StoreError:
            self.clear(job.id)
            raise
        return job

    def get(self, job_id: str) -> VideoJob | None:
        """None for an id that is unknown, deleted or expired."""
        found = self._select("id = ? AND coalesce(expires_at > ?, 1)", (job_id, self._now()))
        return found[0] if found else None

    def number(self, job_id: str) -> int | None:
        """Its place in the order of creation, also once it is deleted; None for an id that was never here."""
        found = self._execute("SELECT number FROM jobs WHERE id = ?", (job_id,))
        return int(found[0][0]) if found else self._gone.get(job_id)

    def page(self, after: int | None, limit: int, newest_first: bool) -> list[VideoJob]:
        """Up to `limit` jobs that follow the number `after`, in the order in which they came."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where = f"coalesce(expires_at > ?, 1) AND (? IS NULL OR number {sign} ?)"
        return self._select(where, (self._now(), after, after), f"ORDER BY number {order} LIMIT {limit:d}")

    def unfinished(self) -> list[VideoJob]:
        """What a server that starts has to do, oldest first."""
        return self._select("status = 'queued'", (), "ORDER BY number")

    def begun(self, job_id: str) -> None:
        self._change(job_id, {"status": "in_progress"})

    def ended(self, job_id: str, error: dict[str, Any] | None, facts: dict[str, Any]) -> None:
        """With its files written, or with an error; kept for EXPIRES_S from now."""
        now = int(self._now())
        status = "completed" if error is None else "failed"
        self._change(job_id, {
            "status": status, "completed_at": now if error is None else None, "expires_at": now + EXPIRES_S,
            "error": json.dumps(error), "facts": json.dumps(facts),
        })  # fmt: skip

    def write(self, job: VideoJob, files: Mapping[str, bytes]) -> None:
        """Into the job's folder; safe to call from a thread."""
        folder = self.folder / job.id
        try:
            with usable():
                folder.mkdir(mode=0o700, exist_ok=True)
                for name, data in files.items():
                    (folder / name).write_bytes(data)
        except StoreError:
            self.clear(job.id)  # half a file is none, and takes room
            raise

    def picture(self, job: VideoJob) -> bytes | None:
        """What the job's video begins with."""
        file = self.folder / job.id / _INPUT
        with usable():
            return file.read_bytes() if file.is_file() else None

    def file(self, job: VideoJob, variant: str) -> Path:
        """`variant` is one of FILES."""
        return self.folder / job.id / FILES[variant]

    def remove(self, job_id: str) -> None:
        """The files, which makes room on a full disk, and the row."""
        self.clear(job_id)
        self._change(job_id, {})

    def clear(self, job_id: str) -> None:
        """The files."""
        shutil.rmtree(self.folder / job_id, ignore_errors=True)

    def sweep(self) -> None:
        """Write what could not be written before; remove what has expired, and files of no job."""
        for job_id, columns in [*self._late.items()]:
            self._change(job_id, columns)
        self._delete("expires_at <= ?", self._now())
        kept = {row[0] for row in self._execute("SELECT id FROM jobs")}
        with usable():
            for folder in self.folder.glob("video_*"):
                if _ID.fullmatch(folder.name) and folder.name not in kept:
                    self.clear(folder.name)

    def close(self) -> None:
        self._table.close()
        if self._private is not None:
            self._private.cleanup()

    def _select(self, where: str, values: tuple[Any, ...], tail: str = "") -> list[VideoJob]:
        columns = list(VideoJob.model_fields)
        rows = self._execute(f"SELECT {', '.join(columns)} FROM jobs WHERE {where} {tail}", values)
        found = (self._as_job(dict(zip(columns, row, strict=True))) for row in rows)
        return [job for job in found if job is not None]

    def _as_job(self, row: dict[str, Any]) -> VideoJob | None:
        """None for a row that is to be deleted, or that no server of this version has written."""
        job_id = str(row["id"])
        late = self._late.get(job_id)
        if late == {}:
            return None
        row |= late or {}
        try:
            parsed = {name: json.loads(row[name] or "null") for name in _AS_JSON}
            if not _ID.fullmatch(job_id):
                raise ValueError("its id is none of ours")
            return VideoJob(**row | parsed | {"facts": parsed["facts"] or {}})
        except (ValueError, TypeError, RecursionError) as error:
            if job_id not in self._broken:
                self._broken.add(job_id)
                logger.warning("a row of %s is passed over: %s", self.folder, str(error).partition("\n")[0][:200])
            return None

    def _change(self, job_id: str, columns: dict[str, Any]) -> None:
        """Set columns of a row, or delete it if there are none; later, if that cannot be written now."""
        names = ", ".join(f"{name} = ?" for name in columns)
        try:
            if columns:
                self._execute(f"UPDATE jobs SET {names} WHERE id = ?", (*columns.values(), job_id))
            else:
                self._delete("id = ?", job_id)
            self._late.pop(job_id, None)
        except StoreError as error:
            if job_id not in self._late:
                logger.error("video %s: %s", job_id, error)
            self._late[job_id] = columns and self._late.get(job_id, {}) | columns

    def _delete(self, where: str, value: Any) -> None:
        """Rows, but not their numbers."""
        self._gone |= dict(self._execute(f"SELECT id, number FROM jobs WHERE {where}", (value,)))
        self._execute(f"DELETE FROM jobs WHERE {where}", (value,))
        for job_id in [*self._gone][:-REMEMBERED]:
            del self._gone[job_id]

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with usable():
            return self._table.execute(statement, values).fetchall()
