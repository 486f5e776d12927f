"""What replies of the server hold: pictures, errors, and the raw bytes of a connection."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from hostile import PRIVATE, says_too_much
from http_server import KEY, Command, Running
from paths import EXAMPLES
from PIL import Image


def picture(b64: str | None) -> Image.Image:
    assert b64
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def pixels(reply: httpx.Response, index: int = 0) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.asarray(picture(reply.json()["data"][index]["b64_json"]), dtype=int)


def digest(reply: httpx.Response, index: int = 0) -> str:
    return hashlib.sha256(pixels(reply, index).astype(np.uint8).tobytes()).hexdigest()


def envelope(reply: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """Asserts that the reply is an error of this status, code and field in the one format."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert not PRIVATE.search(reply.text) and len(reply.content) < 4096


def told(reply: httpx.Response) -> dict[str, Any]:
    """The error of a 400."""
    assert reply.status_code == 400 and len(reply.content) < 4096, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def exchange(server: Command, data: bytes, chunks: Iterable[bytes] = ()) -> tuple[bytes, int]:
    """Send raw bytes, then chunks until something comes back: the answer, and how many bytes were sent before it."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(data)
        sent = 0
        try:
            for chunk in chunks:
                if select.select([raw], [], [], 0.005)[0]:  # time for a busy server to answer
                    break
                raw.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        raw.settimeout(20)
        answer = raw.recv(65536)
    assert answer[9:10] < b"4" or not says_too_much(answer.decode("latin-1")), answer
    return answer, sent


def run_example(server: Running, folder: Path, name: str, *arguments: str) -> None:
    """Run one of examples/serving against the server, in `folder`."""
    file = EXAMPLES / "serving" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    env = os.environ | {"OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, str(file), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
