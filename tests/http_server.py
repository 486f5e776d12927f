"""A server of the demo model in this process's threads: the real engine process behind the real application."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.serve_config import ServeConfig

ENGINE_ARGS = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": 4}


@dataclass
class Running:
    """A server that answers at `url`; `do` runs a coroutine on its loop."""

    url: str
    app: Any
    engine: ProcessEngineClient
    loop: asyncio.AbstractEventLoop

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextmanager
def serve(engine_args: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """Serve until the block ends, on a free port of the loopback interface."""
    config = ServeConfig(engine_args=engine_args or ENGINE_ARGS, **settings)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the real server's
    box: dict[str, Any] = {}
    up = threading.Event()

    async def main() -> None:
        engine = ProcessEngineClient(config.engine_args, max_queued_requests=config.max_queued_requests)
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
    up.wait(120)
    assert "server" in box, "the engine did not start"
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", box["app"], box["engine"], box["loop"])
    finally:
        box["server"].should_exit = True
        thread.join(30)
        sock.close()
