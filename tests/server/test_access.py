"""Access: no route but the probes answers without the key, and the key is in no process list and no log."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from http_replies import exchange
from http_server import KEY, PROCESS_KEY, Command, Running
from starlette.datastructures import Headers
from starlette.routing import Route

from vllm_omni.entrypoints.openai.middleware import OPEN_PATHS, Gatekeeper


def test_no_route_answers_without_the_key(server: Running) -> None:
    routes = [route for route in server.app.routes if isinstance(route, Route)]
    assert len(routes) > 12
    with httpx.Client(base_url=server.url) as client:
        for route in routes:
            path = route.path.replace("{job_id}", "x").replace("{model_id:path}", "x")
            for method in sorted(route.methods or ()):
                for headers in ({}, {"Authorization": "Bearer a-ke"}, {"Authorization": f"Basic {KEY}"},
                                {"Host": "x/health?"}, {"Authorization": f"Bearer {KEY.upper()}"}):  # fmt: skip
                    status = client.request(method, path, headers=headers).status_code
                    opened = route.path in OPEN_PATHS | {"/ui"}
                    assert (status == 401) != opened, (method, path, headers, status)
        for path in ("//v1/models", "/%2fv1/models", "/health/../v1/models", "/health%2f..%2fmetrics", "/x"):
            assert client.get(path).status_code == 401, path


@pytest.mark.parametrize("sent", ["schlüssel-一".encode(), "schlüssel-一x".encode(), b"schl\xfcssel"])
def test_a_key_may_have_any_letters(sent: bytes) -> None:
    """It is compared as the bytes that are sent."""
    gate = SimpleNamespace(keys=[sha256(key.encode()).digest() for key in ("k", "schlüssel-一")])
    headers = Headers(raw=[(b"authorization", b"Bearer " + sent)])
    assert Gatekeeper._owner(gate, headers) == (1 if sent == "schlüssel-一".encode() else None)  # type: ignore[arg-type]


TARGETS = ["//v1/models", "/%2fv1/models", "/v1//models", "/V1/models", "/v1/models/", "/health/../v1/models",
           "/health/%2e%2e/v1/models", "/health%2f..%2fv1/models", "/health;/../v1/models", "/health/", "/Health",
           "/health%00", "/health%20", "/./v1/models", "http://x/v1/models", "http://x/health/../v1/models",
           "/ui/../v1/models", "/ui/", "/docs", "/openapi.json", "/metrics", "/v1/models?x=/health",
           "/v1/models#/health", "*"]  # fmt: skip
LURES = ["Host: x/health?", "Host: /health", "Host: x\r\nX-Original-URL: /health", "Host: x\r\nX-Rewrite-URL: /health",
         "Host: x\r\nX-Forwarded-Prefix: /health", "Host: x\r\nX-Forwarded-For: 127.0.0.1",
         "Host: x\r\nAuthorization: Bearer", "Host: x\r\nAuthorization: Bearer ",
         f"Host: x\r\nAuthorization: {PROCESS_KEY}", f"Host: x\r\nAuthorization: Token {PROCESS_KEY}",
         f"Host: x\r\nAuthorization: Bearer {PROCESS_KEY}x", f"Host: x\r\nAuthorization: Bearer {PROCESS_KEY[:-1]}",
         f"Host: x\r\nAuthorization: Bearer  {PROCESS_KEY}", f"Host: x\r\nCookie: key={PROCESS_KEY}",
         f"Host: x\r\napi-key: {PROCESS_KEY}",
         f"Host: x\r\nX-Api-Key: {PROCESS_KEY}"]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "HEAD"])
def test_no_path_or_header_gets_around_the_key(process: Command, process_http: httpx.Client, method: str) -> None:
    """Every path of the description and every trick of a path, with every trick of a header."""
    known = [path.replace("{", "").replace("}", "") for path in process_http.get("/openapi.json").json()["paths"]]
    opened = {"/health", "/health/live", "/health/ready", "/ping", "/ui"}
    assert len(known) > 15 and opened <= set(known)
    closed = [*TARGETS, *(path for path in known if path not in opened)]
    for target in closed:
        for lure in LURES if target in ("/v1/models", "//v1/models") else LURES[:2]:
            answer, _ = exchange(process, f"{method} {target} HTTP/1.1\r\n{lure}\r\n\r\n".encode())
            assert answer.split()[1] in (b"401", b"400"), (method, target, lure, answer[:200])
            assert b'"data"' not in answer
    for target in opened:
        answer, _ = exchange(process, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.split()[1] == b"200", (target, answer[:100])


@pytest.mark.slow
def test_a_root_path_or_a_websocket_needs_the_key_too(proxied: Running) -> None:
    with httpx.Client(base_url=proxied.url) as client:
        for path in ("/api/v1/models", "/v1/models", "/api/metrics", "/api/api/v1/models", "//api/v1/models"):
            assert client.get(path).status_code == 401, path
            assert (
                client.options(path, headers={"Origin": "http://x", "Access-Control-Request-Method": "GET"}).status_code
                == 401
            )
        assert client.get("/api/health").status_code == 200
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "eA==",
        }
        assert client.get("/v1/models", headers=upgrade).status_code in (400, 401, 403)
        assert client.get("/api/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_the_key_is_not_in_the_process_list_or_the_log(process: Command) -> None:
    shown = Path(f"/proc/{process.process.pid}/cmdline").read_bytes()
    assert PROCESS_KEY.encode() not in shown and b"--api-key ***" in shown.replace(b"\0", b" ")
    assert b"serve" in shown and b"--max-n" in shown
    assert PROCESS_KEY not in process.log.read_text()
