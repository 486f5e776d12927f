"""`vllm-omni ray` in processes of its own, and which these are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from paths import ROOT

START_S = 180.0


@contextmanager
def ray_command(folder: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """`vllm-omni ray demo` with a home of its own, until the block ends by SIGTERM; address, process, log."""
    home = folder / "home"
    home.mkdir()
    log = folder / "log"
    port = 8200 + os.getpid() % 500
    line = [
        sys.executable,
        "-m",
        "vllm_omni",
        "ray",
        "demo",
        "--cache-backend",
        "magcache",
        "--port",
        str(port),
        *words,
    ]
    places = {"PYTHONPATH": str(ROOT), "HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("wb") as out:
        process = subprocess.Popen([*line, *words], stdout=out, stderr=out, env=os.environ | places, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while b"serving demo on" not in log.read_bytes() and time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        assert httpx.get(url + "/health/ready", timeout=30).status_code == 200, log.read_text()[-3000:]
        yield url, process, log
    finally:
        process.terminate()
        process.wait(90)


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, by their command lines."""
    parents: dict[int, list[int]] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                lines[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found, todo = {}, [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            found[child] = lines[child]
            todo.append(child)
    return found


def engine_replicas(pid: int) -> list[int]:
    """The processes of Ray's replicas that have an engine, below that of the command."""
    return [child for child, line in descendants(pid).items() if "ServeReplica:omni:Engine" in line]
