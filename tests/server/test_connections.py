"""Connections that send nothing, send slowly, or do not read: they end, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from certificates import make_certificate
from http_server import GENERATIONS, PROCESS_KEY, Command, command
from paths import ROOT
from waiting import until

from vllm_omni.entrypoints.openai.connections import Loop, guarded

pytestmark = [pytest.mark.slow, pytest.mark.alone]
TIMEOUT_S = 3
AUTH = {"Authorization": f"Bearer {PROCESS_KEY}"}
HEAD = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEAD += f"Authorization: Bearer {PROCESS_KEY}\r\n"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command with 128 descriptors, which it may not raise."""
    limited = ("sh", "-c", 'ulimit -n 128; exec "$@"', "sh")
    words = ("demo", "--api-key", PROCESS_KEY, "--client-timeout", str(TIMEOUT_S))
    with command(tmp_path_factory.mktemp("few"), *words, through=limited) as started:
        yield started


def connect(server: Command, sent: bytes = b"") -> socket.socket:
    place = urlsplit(server.url)
    connection = socket.create_connection((place.hostname or "", place.port or 0), timeout=5)
    connection.sendall(sent)
    return connection


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_silent_connections_keep_nobody_out(few: Command) -> None:
    log, took = few.log.stat().st_size, list[float]()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(few, [b"", b"GET /v1/models HT"][i % 2])) for i in range(140)]
        for _ in range(20):
            began = time.monotonic()
            assert httpx.get(few.url + "/health/live", timeout=5).status_code == 200
            took.append(time.monotonic() - began)
        assert httpx.post(few.url + GENERATIONS, json={"prompt": "x", "steps": 1}, headers=AUTH).status_code == 200
        until(lambda: all(map(closed, idle)))  # silent for longer than the time-out
    print(f"slowest {max(took):.2f} s, usually {median(took):.3f} s, {few.log.stat().st_size - log} bytes of log")
    assert median(took) < 1 and max(took) < TIMEOUT_S, "none waited until the silent ones were dropped"
    assert few.log.stat().st_size - log < 20_000


@pytest.mark.parametrize("sent", [HEAD, HEAD + "Content-Length: 1000\r\n\r\n{", HEAD + "X: " + "x" * 100, "\r\n" * 9])
def test_a_request_that_never_ends_is_dropped(few: Command, sent: str) -> None:
    with connect(few, sent.encode()) as connection:
        began = time.monotonic()
        connection.settimeout(60)
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert time.monotonic() - began > TIMEOUT_S / 2


def test_a_head_that_drips_is_dropped(few: Command) -> None:
    with connect(few, b"GET / HTTP/1.1\r\n") as connection, pytest.raises(OSError):
        for _ in range(10 * 60):
            connection.sendall(b"X")
            time.sleep(0.1)


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(("begin", "more"), [
    (b"GET / HTTP/1.1\r\nX: ", b"y" * 1024), (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 200), (b"GET /", b"y" * 1024),
    (CHUNKED + b"0\r\n", b"X: y\r\n" * 200), (CHUNKED + b"2;", b"y" * 1024), (CHUNKED, b"00000000" * 128),
])  # fmt: skip
def test_what_is_no_body_has_a_limit(reading: tuple[str, int], begin: bytes, more: bytes) -> None:
    """A parser keeps heads, trailers and extensions of chunks, for as long as they come."""
    sent = 0
    with socket.create_connection(reading, timeout=5) as connection:
        connection.sendall(begin)
        with suppress(OSError):
            while sent < 64 * 1024:
                connection.sendall(more)
                sent += 1
    assert sent < 16 * 1024, "KiB: the limit, and what the kernel takes"


def test_a_body_may_come_in_the_smallest_chunks(reading: tuple[str, int]) -> None:
    with socket.create_connection(reading, timeout=30) as connection:
        connection.sendall(CHUNKED + b"000001\r\n \r\n" * 300_000 + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.fixture
def reading() -> Iterator[tuple[str, int]]:
    """The address of a server behind this protocol that reads the whole body before it answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=guarded(16, 30.0), lifespan="off", log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    yield sock.getsockname()
    server.should_exit = True
    thread.join(10)


def test_a_connection_is_kept_between_requests_as_long_as_the_operator_says() -> None:
    """Longer than a client may be silent within a request, or before its first."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    sock = socket.create_server(("127.0.0.1", 0))
    protocol = guarded(16, 0.5, 60.0)
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_level="error", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    with socket.create_connection(sock.getsockname(), timeout=30) as kept:
        for _ in range(2):
            kept.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            reply = b""
            while not reply.endswith(b"ok"):
                part = kept.recv(1000)
                assert part, "closed"
                reply += part
            with socket.create_connection(sock.getsockname()) as silent:
                until(partial(closed, silent))  # and has been silent for less long than the other one
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


REPLY = bytes(32 * 2**20)  # more than the kernel takes


@pytest.fixture
def replying() -> Iterator[tuple[int, set[Any]]]:
    """The port of a server behind this protocol that answers anything with REPLY, and its connections."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = str(len(REPLY)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for start in range(0, len(REPLY), 2**20):
            await send({"type": "http.response.body", "body": REPLY[start : start + 2**20], "more_body": True})
        await send({"type": "http.response.body"})

    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=guarded(16, TIMEOUT_S), lifespan="off", log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    yield sock.getsockname()[1], server.server_state.connections
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_a_reply_that_is_not_read_is_dropped(replying: tuple[int, set[Any]]) -> None:
    port, connections = replying
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(TIMEOUT_S - 1)
        assert len(connections) == 1
        until(lambda: not connections)


def test_a_slow_reader_gets_its_reply(replying: tuple[int, set[Any]]) -> None:
    with socket.create_connection(("127.0.0.1", replying[0])) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got, began = 0, time.monotonic()
        while data := connection.recv(2**19):
            got += len(data)
            time.sleep(0.1)
    assert got > len(REPLY) and time.monotonic() - began > 2 * TIMEOUT_S


def test_the_limit_of_descriptors_is_raised_and_respected() -> None:
    code = """
import resource
from vllm_omni.entrypoints.openai.connections import room
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
print(*room(1024), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
print(*room(1024), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    told = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    (most, backlog, soft), (few, small, low) = (map(int, line.split()) for line in told.splitlines())
    assert (most, backlog) == (1024, 128) and soft > 1024 + 2 * 128 and low == 128
    assert 8 <= few < 128 - 2 * small - 32


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[tuple[str, int], set[Any]]]:
    """The address of a server behind this protocol and TLS, for 16 connections, and those it has."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": scope["scheme"][:2].encode()})

    certificate, key = make_certificate(tmp_path, "localhost")
    sock = socket.create_server(("127.0.0.1", 0))
    options = {"ssl_certfile": certificate, "ssl_keyfile": key, "lifespan": "off", "log_level": "warning"}
    server = uvicorn.Server(uvicorn.Config(app, http=guarded(16, 1.0), **options))

    def run() -> None:
        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(server.serve(sockets=[sock]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield sock.getsockname(), server.server_state.connections
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def over_tls(place: tuple[str, int]) -> bytes:
    """The reply to a request."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(place, timeout=5) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(4096), b""))


def served_beside_silence(place: tuple[str, int], connections: set[Any]) -> bool:
    """Whether a client was served while some of 64 that never finish their greeting had not been dropped yet."""
    assert over_tls(place).endswith(b"\r\n\r\nht")
    hello = b"\x16\x03\x01\x02\x00\x01\x00"  # the first bytes of a greeting, and no more
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(place)) for _ in range(64)]
        for one in silent[::2]:
            one.sendall(hello)
        assert over_tls(place).endswith(b"\r\n\r\nht")
        gone = sum(map(closed, silent))
        assert gone >= 64 - 16, "the oldest made room"
        until(lambda: all(map(closed, silent)) and not connections)
    return gone < 64


def test_a_tls_handshake_that_never_ends_is_dropped_and_keeps_nobody_out(
    secure: tuple[tuple[str, int], set[Any]],
) -> None:
    assert any(served_beside_silence(*secure) for _ in range(3)), "the best of three rounds"


def test_a_tls_client_that_never_asks_or_never_reads_is_dropped(secure: tuple[tuple[str, int], set[Any]]) -> None:
    place, connections = secure
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(place) as plain, context.wrap_socket(plain) as connection:
        until(lambda: len(connections) == 1)
        until(lambda: not connections)
        with suppress(OSError):
            assert connection.recv(1) == b""
