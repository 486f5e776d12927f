"""What the stress scripts over HTTP share: the real command in processes of its own, its metrics, and pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_common as common
import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
VLLM = Path(sys.executable).with_name("vllm")
IMAGES = "/v1/images/generations"
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm_omni:cache_state_bytes",
          "vllm_omni:queued_cost_seconds")  # fmt: skip
START_S = 90.0


@dataclass
class Command:
    """A `vllm serve --omni` that answers at `url`; `engine` is the process of the model."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def engine(self) -> int:
        (pid,) = [pid for pid in common.children(self.process.pid) if "engine.process" in cmdline(pid)]
        return pid

    def end(self) -> int:
        """By SIGTERM; gives the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def cmdline(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextmanager
def command(*flags: str, model: str = "demo", probe: dict[str, str] | None = None) -> Iterator[Command]:
    """Serve until the block ends. `probe`: variables for `tests/probe`, which then is in every process."""
    port = free_port()
    paths = [str(ROOT)] if probe is None else [str(ROOT / "tests/probe"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "PASSIVE"} | (probe or {})
    words = [str(VLLM), "serve", model, "--omni", "--cache-backend", "magcache", "--port", str(port)]
    words += ["--disable-uvicorn-access-log", *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(words, stdout=out, stderr=out, env=environment, cwd=folder)
        server = Command(f"http://127.0.0.1:{port}", process, log)
        try:
            until = time.monotonic() + START_S
            while not _answers(server.url):
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.1)
            yield server
        finally:
            if process.poll() is None:
                server.end()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def metrics(url: str) -> dict[str, float]:
    """Every sample by name and the value of its own label, e.g. `vllm_omni:aborted_total queued`."""
    told: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(url + "/metrics", timeout=30).text):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label != "model_name"]
            told[" ".join([sample.name, *own])] = sample.value
    return told


def gauges(url: str, within_s: float = 30.0) -> list[float]:
    """Running, waiting, cache bytes, queued cost: as soon as all are 0, or as they are after `within_s`."""
    until = time.monotonic() + within_s
    while any(values := [told[name] for told in [metrics(url)] for name in GAUGES]) and time.monotonic() < until:
        time.sleep(0.05)
    return values


def client(url: str, connections: int, **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits, **options)


def pixels(reply: str | bytes | dict[str, Any]) -> np.ndarray:
    """The first picture of a reply."""
    told = reply if isinstance(reply, dict) else json.loads(reply)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"]))), dtype=int)


async def wait(condition: Any, seconds: float) -> float:
    """Seconds until `condition()` holds; at most `seconds`."""
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        await asyncio.sleep(0.005)
    return time.monotonic() - began
