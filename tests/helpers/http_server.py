"""A server of the demo model in this process's threads: the real engine process behind the real application."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from paths import DEMO, ROOT
from pipelines import tiny_wan
from waiting import until

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.entrypoints.engines import make_engine
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.serve_config import HttpOptions, Limits, ServeConfig

KEY = "a-key"
AUTH = {"Authorization": f"Bearer {KEY}"}
PROCESS_KEY = "sk-marker-of-a-key"  # of the real command
OTHER_KEY = "sk-another-key"
GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
CHAT = "/v1/chat/completions"
LONG = {"steps": 200, "size": "256x256", "cache": "off"}  # seconds on every machine; nobody waits for the end
ENGINE_ARGS = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": 4}


def repaint_folder(folder: Path) -> Path:
    """The demo's weights as an image-to-image pipeline: the folder differs in one line."""
    made = folder / "repaint"
    made.mkdir()
    for entry in DEMO.iterdir():
        if entry.name != "model_index.json":
            (made / entry.name).symlink_to(entry)
    index = json.loads((DEMO / "model_index.json").read_text()) | {"_class_name": "FluxImg2ImgPipeline"}
    (made / "model_index.json").write_text(json.dumps(index))
    return made


def video_folder(folder: Path) -> Path:
    """A tiny Wan that makes videos of 9 frames of 32 by 32 pixels in 4 steps."""
    tiny_wan().save_pretrained(folder / "wan")
    own = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4}
    (folder / "wan" / "generation_config.json").write_text(json.dumps(own))
    return folder / "wan"


@dataclass
class Running:
    """A server that answers at `url`; `do` runs a coroutine on its loop."""

    url: str
    app: Any
    engine: ProcessEngineClient
    loop: asyncio.AbstractEventLoop

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def idle(self) -> Any:
        """The statistics once nothing runs."""
        jobs = self.app.state.omni.jobs.running
        end = time.monotonic() + 60
        while time.monotonic() < end:
            stats = self.do(self.engine.stats())
            if not stats.running and not stats.waiting and not jobs:
                return stats
            time.sleep(0.02)
        raise AssertionError(f"not idle: {stats.running} run, {stats.waiting} wait, jobs: {list(jobs)}")


class Held:
    """A long request in a thread, with its reply at the end."""

    def __init__(self, server: Running, body: dict[str, Any], **more: Any) -> None:
        self.body = body | {"steps": 150} | more
        self._url, self.reply = server.url, httpx.Response(0)
        self.thread = threading.Thread(target=self._run)
        before = server.do(server.engine.stats()).running
        self.thread.start()
        until(lambda: server.do(server.engine.stats()).running > before)

    def _run(self) -> None:
        self.reply = httpx.post(self._url + GENERATIONS, json=self.body, headers=AUTH, timeout=60)

    def picture(self) -> str:
        self.thread.join(60)
        assert self.reply.status_code == 200, self.reply.text
        return self.reply.json()["data"][0]["b64_json"]


@contextmanager
def serve(engine_args: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """Serve until the block ends, on a free port of the loopback interface. `settings` are those of all parts."""
    limits, http = ({k: settings.pop(k) for k in part.model_fields if k in settings} for part in (Limits, HttpOptions))
    config = ServeConfig(engine_args=engine_args or ENGINE_ARGS, limits=limits, http=http, **settings)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the real server's
    box: dict[str, Any] = {}
    up = threading.Event()

    async def main() -> None:
        engine = make_engine(config)
        try:
            await engine.start()
            app = build_app(engine, config)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
            box.update(app=app, engine=engine, loop=asyncio.get_running_loop(), server=server)
            up.set()
            await server.serve(sockets=[sock])
        finally:
            await engine.shutdown()
            up.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    up.wait(300)
    assert "server" in box, "the engine did not start"
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", box["app"], box["engine"], box["loop"])
    finally:
        box["server"].should_exit = True
        thread.join(60)
        sock.close()
        state = box["server"].server_state
        assert not thread.is_alive(), f"it does not end: {len(state.connections)} connections, tasks: {state.tasks}"


@dataclass
class Command:
    """`vllm-omni serve` in processes of its own, which answers at `url`; `log` is the file that it writes."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    resting: int = 0  # VmRSS before the first attack

    def status(self, name: str) -> int:
        """Of the front end, in KiB: VmRSS, or VmHWM, the largest since `forget_peak`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def command(folder: Path, *words: str | Path, through: tuple[str, ...] = (), **environment: str) -> Iterator[Command]:
    """The real command, run in `folder` with nothing written outside it, until the block ends by SIGTERM.

    `through`: words before it, which run it.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    root = str(ROOT)
    places = {"PYTHONPATH": root, "HOME": str(folder), "TMPDIR": str(folder), "OMP_WAIT_POLICY": "PASSIVE"}
    line = [*through, sys.executable, "-m", "vllm_omni", "serve", *map(str, words), "--port", str(port)]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=os.environ | places | environment, cwd=folder)
    server = Command(f"http://127.0.0.1:{port}", process, log)
    try:
        until(lambda: ready(server), 300, pause_s=0.1)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def ready(server: Command) -> bool:
    """Whether it takes requests; AssertionError if it has ended instead."""
    assert server.process.poll() is None, server.log.read_text()
    try:
        return httpx.get(server.url + "/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def replace_engine(server: Running, http: httpx.Client, path: str = "/health/ready") -> None:
    """Kill the engine's process, and wait until another one answers at `path`."""
    engine = server.engine._engine
    assert engine is not None
    engine.process.kill()
    engine.process.wait(10)
    until(lambda: server.engine._engine is not engine and http.get(path).status_code == 200, 120, pause_s=0.05)
