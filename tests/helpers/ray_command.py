"""The server on Ray Serve in processes of its own, by either command, and which these are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from paths import ROOT

START_S = 180.0
Running = tuple[str, subprocess.Popen[bytes], Path]  # address, process, log


@contextmanager
def ray_command(folder: Path, *words: str) -> Iterator[Running]:
    """`vllm-omni ray demo` with a home of its own, until the block ends by SIGTERM."""
    port = _port()
    line = ["vllm_omni", "ray", "demo", "--cache-backend", "magcache", "--port", str(port), *words]
    with _running(folder, line, port, b"serving demo on") as running:
        yield running


@contextmanager
def serve_run(folder: Path, file: Path, **environment: str) -> Iterator[Running]:
    """Serve's own `serve run` of a config file, at another port, with a Ray and a home of its own, until SIGTERM."""
    port = _port()
    copy = folder / file.name
    copy.write_text(file.read_text().replace("port: 8000", f"port: {port}"))
    temporary = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    own = {"RAY_TMPDIR": temporary, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    try:
        with _running(folder, ["ray.serve.scripts", "run", str(copy)], port, b"", **own, **environment) as running:
            yield running
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _port() -> int:
    return 8200 + os.getpid() % 500


@contextmanager
def _running(folder: Path, line: list[str], port: int, says: bytes, **environment: str) -> Iterator[Running]:
    home = folder / "home"
    home.mkdir()
    log = folder / "log"
    places = {"PYTHONPATH": str(ROOT), "HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE"} | environment
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as out:
        command = [sys.executable, "-m", *line]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=others | places, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not (_ready(url) and says in log.read_bytes()):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield url, process, log
    finally:
        process.terminate()
        process.wait(90)


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


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
