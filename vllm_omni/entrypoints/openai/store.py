"""Video jobs on disk: one table, and a folder of files for each. Knows no engine and no HTTP.

A folder belongs to one server at a time. Ids are drawn here; nothing that a client sends ever becomes part of a path.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_omni.entrypoints.openai.protocol.replies import VideoRecord
from vllm_omni.errors import InvalidValueError

EXPIRES_S = 24 * 3600
FILES = {"video": "video.mp4", "thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}
_INPUT = "input.png"
_SCHEMA = """CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created_at INTEGER NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, seconds TEXT NOT NULL, size TEXT NOT NULL, fields TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'queued', completed_at INTEGER, expires_at INTEGER, error TEXT, facts TEXT)"""
_AS_JSON = ("fields", "error", "facts")


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
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._table = sqlite3.connect(self.folder / "videos.sqlite3", timeout=0, isolation_level=None)
            self._table.execute("PRAGMA locking_mode = EXCLUSIVE")  # kept until the connection or the process ends
            self._table.execute("PRAGMA journal_mode = WAL")
            self._table.execute("PRAGMA synchronous = NORMAL")
            self._table.execute(_SCHEMA)
            self._table.execute("UPDATE jobs SET status = 'queued' WHERE status = 'in_progress'")
        except (OSError, sqlite3.Error) as error:
            raise InvalidValueError(
                "store_dir", str(folder), f"must be a folder to write to, of this server alone ({error})"
            ) from None
        self.sweep()

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
        self._table.execute(
            "INSERT INTO jobs (id, created_at, model, prompt, seconds, size, fields) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (job.id, job.created_at, model, prompt, seconds, size, json.dumps(fields)),
        )
        return job

    def get(self, job_id: str) -> VideoJob | None:
        """None for an id that is unknown, deleted or expired."""
        found = self._select("id = ? AND coalesce(expires_at > ?, 1)", (job_id, self._now()))
        return found[0] if found else None

    def page(self, after: str | None, limit: int, newest_first: bool) -> list[VideoJob]:
        """Up to `limit` jobs that follow `after`, in the order in which they came."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where = f"coalesce(expires_at > ?, 1) AND (? IS NULL OR number {sign} (SELECT number FROM jobs WHERE id = ?))"
        return self._select(where, (self._now(), after, after), f"ORDER BY number {order} LIMIT {limit:d}")

    def unfinished(self) -> list[VideoJob]:
        """What a server that starts has to do, oldest first."""
        return self._select("status = 'queued'", (), "ORDER BY number")

    def begun(self, job_id: str) -> None:
        self._table.execute("UPDATE jobs SET status = 'in_progress' WHERE id = ?", (job_id,))

    def ended(self, job_id: str, error: dict[str, Any] | None, facts: dict[str, Any]) -> None:
        """With its files written, or with an error; kept for EXPIRES_S from now."""
        now = int(self._now())
        status = "completed" if error is None else "failed"
        self._table.execute(
            "UPDATE jobs SET status = ?, completed_at = ?, expires_at = ?, error = ?, facts = ? WHERE id = ?",
            (status, now if error is None else None, now + EXPIRES_S, json.dumps(error), json.dumps(facts), job_id),
        )

    def write(self, job: VideoJob, files: Mapping[str, bytes]) -> None:
        """Into the job's folder; safe to call from a thread."""
        folder = self.folder / job.id
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def picture(self, job: VideoJob) -> bytes | None:
        """What the job's video begins with."""
        file = self.folder / job.id / _INPUT
        return file.read_bytes() if file.is_file() else None

    def file(self, job: VideoJob, variant: str) -> Path:
        """`variant` is one of FILES."""
        return self.folder / job.id / FILES[variant]

    def remove(self, job_id: str) -> None:
        """The row, then the files."""
        self._table.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        self.clear(job_id)

    def clear(self, job_id: str) -> None:
        """The files."""
        shutil.rmtree(self.folder / job_id, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what has expired, and files of no job."""
        self._table.execute("DELETE FROM jobs WHERE expires_at <= ?", (self._now(),))
        kept = {row[0] for row in self._table.execute("SELECT id FROM jobs")}
        for folder in self.folder.glob("video_" + "[0-9a-f]" * 32):
            if folder.name not in kept:
                self.clear(folder.name)

    def close(self) -> None:
        self._table.close()
        if self._private is not None:
            self._private.cleanup()

    def _select(self, where: str, values: tuple[Any, ...], tail: str = "") -> list[VideoJob]:
        columns = list(VideoJob.model_fields)
        rows = self._table.execute(f"SELECT {', '.join(columns)} FROM jobs WHERE {where} {tail}", values)
        return [_as_job(dict(zip(columns, row, strict=True))) for row in rows]


def _as_job(row: dict[str, Any]) -> VideoJob:
    parsed = {name: json.loads(row[name] or "null") for name in _AS_JSON}
    return VideoJob(**row | parsed | {"facts": parsed["facts"] or {}})
