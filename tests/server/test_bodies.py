"""Bodies and raw bytes beyond the limits, and a full queue: refused early, at a bounded cost; the server goes on."""

from __future__ import annotations

import itertools
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hostile import (
    says_too_much,
)
from http_replies import envelope, exchange, told
from http_server import EDITS, GENERATIONS, KEY, PROCESS_KEY, Command, Running
from waiting import until

from vllm_omni.entrypoints.openai.protocol.bodies import Meter
from vllm_omni.entrypoints.openai.protocol.errors import ApiError

LIMIT = 4 * 2**20  # of a body sent to the command, in bytes
ENDLESS = 64 * 2**20  # bytes that would be sent if they were read
POST = b"POST %b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % (GENERATIONS.encode(), KEY.encode())
RAW = [
    b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"b" * 1_000_000 + b"\r\n\r\n",
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    POST + b"Content-Length: -1\r\n\r\n",
    POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 65_000 + b"0\r\n\r\n",
    b"G\0T / HTTP/1.1\r\n\r\n", b"\r\n\r\n\r\n", b"POST http://x/../../etc HTTP/1.1\r\nHost: x\r\n\r\n",
    POST + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n" + b"\x1f\x8b" * 10,
]  # fmt: skip


def test_raw_bytes_are_refused_and_leak_no_descriptor(server: Running, http: httpx.Client) -> None:
    fds = Path("/proc/self/fd")
    http.get("/health")
    before = len(list(fds.iterdir()))
    for data in RAW * 3:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as raw:
            try:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(65536)
            except OSError:
                answer = b""
            assert not answer or int(answer.split()[1]) in range(400, 500), (data[:60], answer[:100])
            if answer:
                assert not says_too_much(answer.decode("latin-1")), answer
    assert http.get("/health").status_code == 200
    until(lambda: len(list(fds.iterdir())) <= before + 4, 20)


def test_no_method_on_any_route_is_a_server_error(server: Running, http: httpx.Client) -> None:
    known = sorted({route.path for route in server.app.routes if "{" not in route.path})
    paths = [*known, "/", "/%00", "/..%2f..%2fetc/passwd"]
    for path, method in itertools.product(
        paths, ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X" * 20)
    ):
        reply = http.request(method, path, content=b"\xff{" if method in ("POST", "PUT") else None)
        assert reply.status_code < 500, (method, path, reply.text)


def test_bodies_over_the_limit_are_refused(http: httpx.Client, server: Running) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 65536
            yield b"x" * 65536

    assert http.post(GENERATIONS, content=b"x" * (1 << 21)).status_code == 413
    assert http.post(GENERATIONS, content=chunks()).status_code == 413
    bomb = zlib.compress(b"x" * 10_000_000)
    assert http.post(GENERATIONS, content=bomb, headers={"Content-Encoding": "deflate"}).status_code == 400
    edges = [("image", b"x")] * 10_000
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in edges
    )
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (
        parts[:900_000] + b"--b--\r\n",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b",
        b"",
    ):
        reply = http.post("/v1/images/edits", content=body, headers=form)
        assert reply.status_code == 400, reply.text


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"prompt": "x", "image": "data:%s", "n": 1}', True),
        ('{"messages": [{"content": [{"text": "x"}, {"image":"%s"}, {"type": "image", "image" :\n"%s"}]}]}', True),
        ('{"image": ["%s"]}', False),
        ('{"image": %s}', False),
        ('{"image": "", "prompt": "%s"}', False),
        ('{"image": "x", %s', False),
        ('{"not": "image", "prompt": "%s"}', False),
        ('{"images": "%s"}', False),
    ],
)
@pytest.mark.parametrize("part", [7, 65536])
def test_pictures_alone_do_not_count_as_json(text: str, taken: bool, part: int) -> None:
    """As `data:` URLs, or in the short parts of a chat, wherever the network has cut the text."""
    body, meter = text.replace("%s", "A" * 5000).encode(), Meter(1000)
    try:
        for start in range(0, len(body), part):
            meter.take(body[start : start + part])
    except ApiError as error:
        assert not taken and error.status == 413
    else:
        assert taken


def test_a_full_queue_refuses_with_retry_after(server: Running, http: httpx.Client) -> None:
    full = http.post(GENERATIONS, json={"prompt": "x", "n": 10, "steps": 50, "cache": "off"})
    envelope(full, 503, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    server.idle()
    assert http.post(GENERATIONS, json={"prompt": "x", "steps": 2}).status_code == 200


def endless(size: int = 65536) -> Iterator[bytes]:
    for _ in range(ENDLESS // size):
        yield b"%x\r\n%b\r\n" % (size, b"x" * size)


def multipart(parts: Iterator[bytes]) -> bytes:
    return b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--b--\r\n"


BOMB = zlib.compress(b"x" * (200 * 2**20))
FORMS = {
    "10,000 fields": multipart(b'name="f%d"\r\n\r\nx' % i for i in range(10_000)),
    "10,000 fields of one name": multipart(b'name="prompt"\r\n\r\nx' for _ in range(10_000)),
    "10,000 files": multipart(b'name="image"; filename="a"\r\n\r\nx' for _ in range(10_000)),
    "a part without a name": multipart(iter([b"\r\n\r\nx"])),
    "a file without a name": multipart(iter([b'filename="a"\r\n\r\nx'])),
    "a field of 3 MiB": multipart(iter([b'name="prompt"\r\n\r\n' + b"x" * (3 * 2**20)])),
    "a header of 3 MiB": multipart(iter([b'name="' + b"x" * (3 * 2**20) + b'"\r\n\r\nx'])),
    "10,000 headers of a part": multipart(iter([b'name="a"' + b"\r\nX: y" * 10_000 + b"\r\n\r\nx"])),
    "no end": b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\nx", "nothing": b"", "no boundary": b"x" * 100_000,
}  # fmt: skip


def post(head: str, body: bytes = b"", kind: str = "application/json", path: str = EDITS) -> bytes:
    key = f"Authorization: Bearer {PROCESS_KEY}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{key}\r\nContent-Type: {kind}\r\n{head}\r\n\r\n".encode() + body


@pytest.mark.alone
def test_a_body_over_the_limit_is_not_kept_in_memory(process: Command, process_http: httpx.Client) -> None:
    """Told lengths are refused before 1 MB was sent, untold ones at the limit; memory grows by hardly more than it."""
    assert process_http.get("/health").status_code == 200
    process.forget_peak()
    before = process.status("VmRSS")
    chunked = "Transfer-Encoding: chunked"
    answer, sent = exchange(process, post(f"Content-Length: {ENDLESS}"), (b"x" * 4096 for _ in range(16384)))
    assert answer.split()[1] == b"413" and sent < 2**20, (sent, answer[:100])
    for kind in ("application/json", "multipart/form-data; boundary=b"):
        answer, sent = exchange(process, post(chunked, kind=kind), endless())
        assert answer.split()[1] in (b"413", b"400") and sent < 2 * LIMIT + 8 * 2**20, (sent, answer[:100])
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        head = f"Content-Encoding: {encoding}\r\nContent-Length: {len(BOMB)}"
        answer, _ = exchange(process, post(head, BOMB))
        assert answer.split()[1] == b"400", answer[:100]
    assert process.status("VmHWM") - before < ENDLESS / 4 / 1024, "KiB: of each of those bodies, a part"
    assert process_http.get("/health").status_code == 200


@pytest.mark.alone
@pytest.mark.parametrize("name", FORMS)
def test_oversized_and_malformed_forms_are_refused(process: Command, process_http: httpx.Client, name: str) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    process_http.post(EDITS, content=FORMS[name], headers=form)  # buffers grow once
    process.forget_peak()
    before, descriptors = process.status("VmRSS"), process.descriptors()
    told(process_http.post(EDITS, content=FORMS[name], headers=form))
    assert process.status("VmHWM") - before < 20_000, "KiB"
    assert process.descriptors() <= descriptors + 1


def test_broken_connections_leak_no_descriptor(process: Command, process_http: httpx.Client) -> None:
    """Half requests, broken ones and connections that say nothing, 300 in all: closed again, and others are served."""
    process_http.get("/health")
    before = process.descriptors()
    port = int(process.url.rpartition(":")[2])
    chunked = post("Transfer-Encoding: chunked", b"5\r\nab")
    odd = [b"", b"G", b"GET / HTTP/1.1\r\n", post("Content-Length: 100", b"x"), chunked, b"\x16\x03\x01\x02\x00" * 20,
           b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]  # fmt: skip
    for number in range(300):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(odd[number % len(odd)])
    until(lambda: process.descriptors() <= before + 2)
    assert process_http.get("/health").status_code == 200
