"""Browsers: a foreign page cannot use the server of whoever looks at it, whatever it sends and whatever name it has."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from http_replies import envelope
from http_server import AUTH, CHAT, EDITS, GENERATIONS, Running, serve

BODY = '{"prompt": "x", "steps": 1, "size": "64x64"}'
CHAT_BODY = '{"messages": [{"role": "user", "content": "x"}], "steps": 1, "size": "64x64"}'
EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def named() -> Iterator[Running]:
    """A server behind names of its own, which a page of one origin may use."""
    with serve(allowed_hosts=("pictures.example", "127.0.0.1"), allowed_origins=("https://shop.example",),
               warmup=False) as running:  # fmt: skip
        yield running


@pytest.mark.parametrize("path", [GENERATIONS, CHAT])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=X"])
def test_json_routes_take_no_content_type_that_needs_no_preflight(server: Running, path: str, kind: str) -> None:
    body, headers = CHAT_BODY if path == CHAT else BODY, AUTH | {"Content-Type": kind}
    foreign = httpx.post(server.url + path, content=body, headers=headers | {"Origin": EVIL})
    envelope(foreign, 403, "cross_origin")
    if (path, kind) != (CHAT, "application/x-www-form-urlencoded"):  # `curl -d` calls everything so
        envelope(httpx.post(server.url + path, content=body, headers=headers), 400, "invalid_request")


@pytest.mark.parametrize("headers", [{"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                                     {"Sec-Fetch-Site": "same-site"}, {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"},
                                     {"Origin": "http://127.0.0.1:1"}])  # fmt: skip
@pytest.mark.parametrize("path", [GENERATIONS, CHAT, EDITS])
def test_a_foreign_page_changes_nothing(server: Running, path: str, headers: dict[str, str]) -> None:
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}):
        body = CHAT_BODY if path == CHAT else BODY
        reply = httpx.post(server.url + path, content=body, headers=AUTH | headers | kind)
        envelope(reply, 403, "cross_origin")
    form = httpx.post(server.url + path, files={"prompt": (None, "x")}, headers=AUTH | headers)
    envelope(form, 403, "cross_origin")
    envelope(httpx.delete(server.url + "/v1/images/jobs/x", headers=AUTH | headers), 403, "cross_origin")
    assert httpx.get(server.url + "/v1/models", headers=AUTH | headers).status_code == 200, "reading is CORS's affair"


def test_the_servers_own_page_and_programs_are_served(server: Running) -> None:
    for headers in ({}, {"Origin": server.url}, {"Origin": server.url, "Sec-Fetch-Site": "same-origin"},
                    {"Sec-Fetch-Site": "none"}):  # fmt: skip
        kind = {"Content-Type": "application/json"}
        reply = httpx.post(server.url + GENERATIONS, content=BODY, headers=AUTH | headers | kind, timeout=60)
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.x:1",
                                  "[::2]:1", "192.168.0.1", "x/health?", ""])  # fmt: skip
def test_a_name_that_leads_to_loopback_is_not_served(server: Running, host: str) -> None:
    """DNS rebinding: the page's own name resolves to 127.0.0.1, so that its requests are of one origin."""
    for method, path in (("GET", "/v1/models"), ("POST", GENERATIONS), ("GET", "/metrics"), ("GET", "/openapi.json")):
        headers = AUTH | {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        reply = httpx.request(method, server.url + path, headers=headers)
        envelope(reply, 400, "invalid_host")
        assert "--allowed-hosts" in reply.text
    assert httpx.get(server.url + "/health/live", headers={"Host": host}).status_code == 200, "probes reveal nothing"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]", "[::1]:8000", "machine"])
def test_the_names_of_loopback_are_served(server: Running, host: str) -> None:
    assert httpx.get(server.url + "/v1/models", headers=AUTH | {"Host": host}).status_code == 200


@pytest.mark.slow
def test_the_operator_names_hosts_and_origins(named: Running) -> None:
    for host, status in (("pictures.example", 200), ("pictures.example:443", 200), ("localhost", 400), ("x", 400)):
        assert httpx.get(named.url + "/v1/models", headers={"Host": host}).status_code == status
    for origin, status in (("https://shop.example", 200), (EVIL, 403)):
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}
        assert httpx.post(named.url + GENERATIONS, content=BODY, headers=headers, timeout=60).status_code == status
