"""The real command under hostile clients: what is read before it is refused, what it costs, and who may ask.

One server of its own processes, of the demo's weights as an image-to-image pipeline, with a key and small limits.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import time
import zlib
from collections.abc import Iterable, Iterator
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hostile import NUMBERS, PATHS, bad_pictures, good_pictures, quickest, saved, says_too_much, scene, wrong_numbers
from http_server import Command, command, repaint_folder
from PIL import Image

from vllm_omni.outputs.media import open_image

KEY = "sk-marker-of-a-key"
AUTH = {"Authorization": f"Bearer {KEY}"}
EDITS = "/v1/images/edits"
LIMIT = 4 * 2**20  # of a body, in bytes
ERRORS: list[str] = []  # the body of every error that a test here was told
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here; tools/setup.sh installs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's working directory, home and place for temporary files."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    model = repaint_folder(tmp_path_factory.mktemp("models"))
    limits = ("--max-body-mb", "4", "--max-steps", "8", "--max-n", "2", "--max-pixels", "65536", "--ui")
    with command(folder, model, "--api-key", KEY, *limits, "--cache-backend", "magcache") as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Command) -> Iterator[httpx.Client]:
    def keep(reply: httpx.Response) -> None:
        if reply.status_code >= 400:
            reply.read()
            ERRORS.append(reply.text)

    with httpx.Client(base_url=server.url, headers=AUTH, timeout=60, event_hooks={"response": [keep]}) as client:
        client.post(EDITS, data={"prompt": "x", "steps": "2"}, files={"image": saved(scene())})  # warm
        yield client


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
                raw.setblocking(False)
                try:
                    if raw.recv(1, socket.MSG_PEEK):
                        break
                except BlockingIOError:
                    pass
                raw.settimeout(20)
                raw.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        raw.settimeout(20)
        answer = raw.recv(65536)
    if answer[9:10] >= b"4":
        ERRORS.append(answer.decode("latin-1"))
    return answer, sent


# --------------------------------------------------------------------------------------------------------- who may ask


def test_s11_the_key_is_not_in_ps(server: Command) -> None:
    shown = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert KEY.encode() not in shown and b"--api-key ***" in shown.replace(b"\0", b" ")
    assert b"serve" in shown and b"--max-n" in shown
    assert KEY not in server.log.read_text()


TARGETS = ["//v1/models", "/%2fv1/models", "/v1//models", "/V1/models", "/v1/models/", "/health/../v1/models",
           "/health/%2e%2e/v1/models", "/health%2f..%2fv1/models", "/health;/../v1/models", "/health/", "/Health",
           "/health%00", "/health%20", "/./v1/models", "http://x/v1/models", "http://x/health/../v1/models",
           "/ui/../v1/models", "/ui/", "/docs", "/openapi.json", "/metrics", "/v1/models?x=/health",
           "/v1/models#/health", "*"]  # fmt: skip
LURES = ["Host: x/health?", "Host: /health", "Host: x\r\nX-Original-URL: /health", "Host: x\r\nX-Rewrite-URL: /health",
         "Host: x\r\nX-Forwarded-Prefix: /health", "Host: x\r\nX-Forwarded-For: 127.0.0.1",
         "Host: x\r\nAuthorization: Bearer", "Host: x\r\nAuthorization: Bearer ",
         f"Host: x\r\nAuthorization: {KEY}", f"Host: x\r\nAuthorization: Token {KEY}",
         f"Host: x\r\nAuthorization: Bearer {KEY}x", f"Host: x\r\nAuthorization: Bearer {KEY[:-1]}",
         f"Host: x\r\nAuthorization: Bearer  {KEY}", f"Host: x\r\nCookie: key={KEY}", f"Host: x\r\napi-key: {KEY}",
         f"Host: x\r\nX-Api-Key: {KEY}"]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "HEAD"])
def test_s9_nothing_answers_without_the_key(server: Command, http: httpx.Client, method: str) -> None:
    """Every path of the description and every trick of a path, with every trick of a header."""
    known = [path.replace("{", "").replace("}", "") for path in http.get("/openapi.json").json()["paths"]]
    opened = {"/health", "/health/live", "/health/ready", "/ping", "/ui"}
    assert len(known) > 15 and opened <= set(known)
    closed = [*TARGETS, *(path for path in known if path not in opened)]
    for target in closed:
        for lure in LURES if target in ("/v1/models", "//v1/models") else LURES[:2]:
            answer, _ = exchange(server, f"{method} {target} HTTP/1.1\r\n{lure}\r\n\r\n".encode())
            assert answer.split()[1] in (b"401", b"400"), (method, target, lure, answer[:200])
            assert b'"data"' not in answer
    for target in opened:
        answer, _ = exchange(server, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.split()[1] == b"200", (target, answer[:100])


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", NUMBERS)
def test_s2_numbers_of_a_form(http: httpx.Client, name: str) -> None:
    picture = saved(scene())
    values = [text.strip('"') for text in wrong_numbers(name) if text != '"1"']  # a form has nothing but strings
    for value in [*values, "", "null", "x", "0x10", "١٢x", "1 2"]:

        def ask(value: str = value) -> httpx.Response:
            return http.post(EDITS, files={"image": picture, "prompt": (None, "x"), name: (None, value)})

        assert told(ask())["param"] == {"steps": "num_inference_steps"}.get(name, name), value
    assert quickest(ask, 0.005) < 0.005
    for key in (f"{name}[]", f"{name}[a]"):
        assert told(http.post(EDITS, files={"image": picture, "prompt": (None, "x"), key: (None, "1")}))["param"]


# -------------------------------------------------------------------------------------------------------------- bodies


def endless(size: int = 65536) -> Iterator[bytes]:
    for _ in range(64 * 2**20 // size):
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
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: {kind}\r\n{head}\r\n\r\n"
            ).encode() + body  # fmt: skip


def test_s5_what_is_too_long_is_not_kept(server: Command, http: httpx.Client) -> None:
    """Told lengths are refused before 1 MB was sent, untold ones at the limit; memory grows by hardly more than it."""
    assert http.get("/health").status_code == 200
    server.forget_peak()
    before = server.status("VmRSS")
    chunked = "Transfer-Encoding: chunked"
    answer, sent = exchange(server, post(f"Content-Length: {64 * 2**20}"), (b"x" * 4096 for _ in range(16384)))
    assert answer.split()[1] == b"413" and sent < 2**20, (sent, answer[:100])
    for kind in ("application/json", "multipart/form-data; boundary=b"):
        answer, sent = exchange(server, post(chunked, kind=kind), endless())
        assert answer.split()[1] in (b"413", b"400") and sent < 2 * LIMIT + 8 * 2**20, (sent, answer[:100])
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        head = f"Content-Encoding: {encoding}\r\nContent-Length: {len(BOMB)}"
        answer, _ = exchange(server, post(head, BOMB))
        assert answer.split()[1] == b"400", answer[:100]
    assert server.status("VmHWM") - before < 2 * LIMIT / 1024 + 2048, "KiB"
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("name", FORMS)
def test_s5_forms(server: Command, http: httpx.Client, name: str) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    http.post(EDITS, content=FORMS[name], headers=form)  # buffers grow once
    server.forget_peak()
    before, descriptors = server.status("VmRSS"), server.descriptors()
    told(http.post(EDITS, content=FORMS[name], headers=form))
    assert server.status("VmHWM") - before < 20_000, "KiB"
    assert server.descriptors() <= descriptors + 1


def test_s4_descriptors_stay(server: Command, http: httpx.Client) -> None:
    """Half requests, broken ones and connections that say nothing, 300 in all: closed again, and others are served."""
    http.get("/health")
    before = server.descriptors()
    port = int(server.url.rpartition(":")[2])
    chunked = post("Transfer-Encoding: chunked", b"5\r\nab")
    odd = [b"", b"G", b"GET / HTTP/1.1\r\n", post("Content-Length: 100", b"x"), chunked, b"\x16\x03\x01\x02\x00" * 20,
           b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]  # fmt: skip
    for number in range(300):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(odd[number % len(odd)])
    for _ in range(100):
        if server.descriptors() <= before + 2:
            break
        time.sleep(0.1)
    assert server.descriptors() <= before + 2
    assert http.get("/health").status_code == 200


# ------------------------------------------------------------------------------------------------------------ pictures

BAD, GOOD = bad_pictures(), good_pictures()


@pytest.mark.parametrize("name", BAD)
def test_s6_bad_pictures(server: Command, http: httpx.Client, name: str) -> None:
    def ask() -> httpx.Response:
        return http.post(EDITS, data={"prompt": "x", "steps": "1"}, files={"image": ("a.png", BAD[name], "image/png")})

    ask()
    server.forget_peak()
    before = server.status("VmRSS")
    error = told(ask())
    assert (error["code"], error["param"]) == ("invalid_image", "image")
    assert quickest(ask, 0.05) < 0.05
    assert server.status("VmHWM") - before < 50_000, "KiB"
    url = "data:image/png;base64," + base64.b64encode(BAD[name]).decode()
    assert told(http.post(EDITS, data={"prompt": "x", "url": url}, files={"a": (None, "")}))["param"] in ("url", "a")


def made(http: httpx.Client, picture: bytes) -> np.ndarray:
    """What little strength makes of it."""
    fields = {"prompt": "x", "steps": "4", "strength": "0.3", "seed": "1", "cache": "off"}
    reply = http.post(EDITS, data=fields, files={"image": picture})
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))))


@pytest.mark.parametrize("name", GOOD)
def test_s6_good_pictures(http: httpx.Client, name: str) -> None:
    """Decoded to the right pixels; over HTTP the result is that of the upright RGB picture."""
    data, wanted = GOOD[name]
    assert wanted.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(wanted))
    if "JPEG" in name:  # and those are the colours that were put in
        assert np.abs(np.asarray(wanted, dtype=int) - np.asarray(scene())).mean() < 3
    if name == "PNG":
        assert not np.array_equal(made(http, data), made(http, saved(wanted.transpose(Image.Transpose.ROTATE_180))))
    np.testing.assert_array_equal(made(http, data), made(http, saved(wanted)))


# --------------------------------------------------------------------------------------------------------------- names


def tree(folder: Path) -> set[tuple[str, int]]:
    """All files but the log, with their sizes."""
    files = [path for path in folder.rglob("*") if path.name != "log"]
    return {(str(path), path.lstat().st_size if path.is_file() else 0) for path in files}


def test_s8_no_name_is_a_path(server: Command, http: httpx.Client, folder: Path) -> None:
    """File names, adapters, models, jobs, profiles, videos: 400 or 404, and no file anywhere in reach."""
    (folder / "link").symlink_to("/etc")
    before, outside = tree(folder), tree(folder.parent)
    picture = saved(scene())
    connection = HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=20)
    for name in [*PATHS, "x\0y", str(folder / "canary"), "../canary", "a" * 5000]:
        for field in ("lora", "lora[name]", "model", "cache[profile]", "cache", "lora_request[][path]"):
            reply = http.post(EDITS, data={"prompt": "x", "steps": "1", field: name}, files={"image": picture})
            assert reply.status_code in (400, 404), (field, name, reply.text)
        sent = http.post(EDITS, data={"prompt": "x", "steps": "1"}, files={"image": (name, picture, "image/png")})
        assert sent.status_code == (400 if len(name) > 4096 else 200), sent.text
        odd = http.post(EDITS, data={"prompt": "x", "steps": "1"}, files={name: ("a", picture, "image/png")})
        assert odd.status_code == 400, odd.text
        for method, path in (("GET", "/v1/models/"), ("DELETE", "/v1/images/jobs/"), ("GET", "/v1/videos/"),
                             ("GET", "/ui/"), ("GET", "/")):  # fmt: skip
            target = path + "".join(letter if " " < letter < "\x7f" else f"%{ord(letter):02x}" for letter in name)
            connection.putrequest(method, target, skip_host=False, skip_accept_encoding=True)
            connection.putheader("Authorization", f"Bearer {KEY}")
            connection.endheaders()
            answer = connection.getresponse()
            body = answer.read().decode()
            ERRORS.append(body)
            assert answer.status in (400, 404, 405), (method, target, body)
    assert tree(folder) == before and tree(folder.parent) - outside == set()


def test_s14_no_error_says_too_much() -> None:
    """All the error bodies that the tests above were told."""
    assert len(ERRORS) > 300 and not list(filter(says_too_much, ERRORS))
    assert KEY not in "".join(ERRORS)
    assert all(json.loads(text)["error"]["code"] for text in ERRORS if text.startswith("{"))
