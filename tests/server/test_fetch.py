"""Pictures from addresses: what may be fetched, and that nothing else is ever connected to."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificate

from vllm_omni.entrypoints.openai import media as module
from vllm_omni.entrypoints.openai.media import fetch, is_public
from vllm_omni.entrypoints.openai.protocol.errors import ApiError

HOST = "pictures.example"
PUBLIC = "93.184.215.14"


class Trap:
    """A TLS server for HOST that answers with `reply`; `met` counts the connections."""

    def __init__(self, folder: Path) -> None:
        self.met, self.reply, self.asked = 0, b"", b""
        self.certificate, key = make_certificate(folder, HOST)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self.socket, self.context = socket.create_server(("127.0.0.1", 0)), context
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            try:
                plain, _ = self.socket.accept()
            except OSError:
                return
            self.met += 1
            try:
                with self.context.wrap_socket(plain, server_side=True) as secure:
                    self.asked = secure.recv(65536)
                    secure.sendall(self.reply)
                    while self.reply.endswith(b"drip"):
                        time.sleep(0.05)
                        secure.sendall(b".")
            except OSError:
                pass


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trap]:
    trap = Trap(tmp_path_factory.mktemp("tls"))
    yield trap
    trap.socket.close()


@pytest.fixture
def wired(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    """Any address that is connected to is the trap, whose certificate is trusted; `addresses` is what DNS says."""
    trust = ssl.create_default_context
    trap.met, trap.addresses, trap.went = 0, [PUBLIC], []  # type: ignore[attr-defined]

    def dns(host: str, port: int, **options: Any) -> list[Any]:
        if host != HOST:
            raise OSError(host)
        return [(0, 0, 0, "", (address, port)) for address in trap.addresses]  # type: ignore[attr-defined]

    def reach(address: tuple[str, int], timeout: float) -> socket.socket:
        trap.went.append(address)  # type: ignore[attr-defined]
        plain = socket.socket()
        plain.settimeout(timeout)
        plain.connect(trap.socket.getsockname())
        return plain

    monkeypatch.setattr(socket, "getaddrinfo", dns)
    monkeypatch.setattr(socket, "create_connection", reach)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trust(cafile=trap.certificate))
    yield trap


def ask(url: str, limit: int = 1000) -> bytes:
    return fetch(url, "url", (HOST, "other.example", "127.0.0.1", "localhost", "[::1]", "0"), limit)


def test_an_allowed_host_is_fetched_from_its_own_address(wired: Trap) -> None:
    wired.reply = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\npng"
    assert ask(f"https://{HOST}/a.png?b=c") == b"png"
    assert wired.went == [(PUBLIC, 443)]
    assert wired.asked.startswith(b"GET /a.png?b=c HTTP/1.1\r\n") and f"Host: {HOST}".encode() in wired.asked


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "https://127.0.0.1/x", "https://localhost/", "https://[::1]/", "https://0/",
     "https://0x7f000001/",
     "https://2130706433/", "https://0177.0.0.1/", "https://169.254.169.254/latest/meta-data/", "https://10.0.0.1/",
     "https://127.1/", "https://evil.example/", f"https://{HOST}.evil.example/", f"https://{HOST}@127.0.0.1/",
     f"https://127.0.0.1\\@{HOST}/", f"https://{HOST}:22/", f"https://{HOST}:443@evil.example/", 
     f"https://{HOST}#@evil/",
     f"https://{HOST}/\r\nX: y", f"https://{HOST}/ x", f"http://{HOST}/", f"//{HOST}/", f"ftp://{HOST}/",
     "file:///etc/passwd",
     f"gopher://{HOST}/", "", "https://", "https:///etc", f"https://{HOST.upper()}/\0", f"https://{HOST}",
     "javascript:1", "https://ⓟictures.example/", f"https://{HOST}./"],
)  # fmt: skip
def test_other_addresses_are_refused_without_a_connection(wired: Trap, url: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask(url)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_image", "url")
    assert wired.met == 0


PRIVATE = ["127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
           "224.0.0.1", "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1",
           "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1",
           "2001:db8::1"]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_with_any_private_address_is_refused(wired: Trap, address: str) -> None:
    wired.addresses = [PUBLIC, address]  # type: ignore[attr-defined]
    with pytest.raises(ApiError, match="public"):
        ask(f"https://{HOST}/x")
    assert wired.met == 0 and not is_public(address)


def test_public_addresses_are_accepted() -> None:
    assert all(map(is_public, (PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c")))
    assert ipaddress.ip_address(PUBLIC).is_global


def test_a_name_is_resolved_once(wired: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that changes its answer between the check and the connection changes nothing."""
    wired.reply = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\npng"
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(0, 0, 0, "", (x, 443)) for x in next(answers)])
    ask(f"https://{HOST}/x")
    assert wired.went == [(PUBLIC, 443)] and next(answers) == ["127.0.0.1"]


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\nx",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001, b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000,
     b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nxx", b"SSH-2.0-x\r\n", b""],
)  # fmt: skip
def test_replies_that_are_not_a_complete_small_picture_are_refused(wired: Trap, reply: bytes) -> None:
    wired.reply = reply
    with pytest.raises(ApiError) as caught:
        ask(f"https://{HOST}/x")
    assert caught.value.status == 400 and wired.met == 1


@pytest.mark.parametrize("rest", [b"X: drip", b"Content-Length: 900\r\n\r\ndrip"])
def test_a_body_without_end_is_given_up(wired: Trap, monkeypatch: pytest.MonkeyPatch, rest: bytes) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.5)
    wired.reply, began = b"HTTP/1.1 200 OK\r\n" + rest, time.monotonic()
    with pytest.raises(ApiError):
        ask(f"https://{HOST}/x")
    assert time.monotonic() - began < 20  # the body never ends


def test_a_wrong_certificate_is_refused(wired: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
    monkeypatch.setattr(ssl, "create_default_context", lambda: context)
    wired.reply = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\npng"
    with pytest.raises(ApiError):
        ask(f"https://{HOST}/x")
