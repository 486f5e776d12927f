"""Pictures from addresses, where the operator allows hosts: no reply and no name server can send us elsewhere.

A name is resolved once, every address it has must be public, and the connection goes to one of those addresses, with
TLS for the name. Redirects are not followed; no proxy and no cookie is used. Knows no route and no engine.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress

from vllm_omni.entrypoints.openai.errors import ApiError, invalid

PORT = 443
SECONDS = 10.0  # for one picture, from resolving its host to its last byte
_URL = re.compile(r"https://([a-z0-9.-]{1,253})(?::443)?(/[!$&-;=?-Z_a-z~%]{0,2000})", re.ASCII)
_IPV6_INTERNET = ipaddress.ip_network("2000::/3")
_TUNNELS = tuple(map(ipaddress.ip_network, ("2001::/32", "2002::/16")))  # Teredo, 6to4: an IPv4 address inside


def fetch(url: str, field: str, hosts: Sequence[str], max_bytes: int) -> bytes:
    """The body behind an https address of one of `hosts`; ApiError 400 that names `field` for anything else.

    Blocks for at most `SECONDS` and a name server's own time-out; to be called off the event loop.
    """
    if not (match := _URL.fullmatch(url)):
        raise _refused(field, "must be a data: URL, or https://HOST/PATH without port, user or fragment")
    host, path = match[1], match[2]
    if host not in hosts:
        raise _refused(field, "names a host that this server does not fetch from")
    address = resolve(host, field)
    try:
        return _get(host, address, path, field, max_bytes)
    except (OSError, http.client.HTTPException):
        raise _refused(field, "could not be fetched") from None


def resolve(host: str, field: str) -> str:
    """One of the host's addresses; ApiError unless all of them are public."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise _refused(field, "names a host that cannot be found") from None
    if not found or not all(map(is_public, found)):
        raise _refused(field, "names a host without a public address")
    return min(found)


def is_public(address: str) -> bool:
    """True for an address of the Internet: not loopback, private, link-local, shared, multicast or a tunnel's."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a zone: link-local
        return False
    if parsed.version == 6 and (parsed not in _IPV6_INTERNET or any(parsed in tunnel for tunnel in _TUNNELS)):
        return False
    return parsed.is_global and not parsed.is_multicast


def _get(host: str, address: str, path: str, field: str, max_bytes: int) -> bytes:
    plain = socket.create_connection((address, PORT), timeout=SECONDS)
    secure = ssl.create_default_context().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    late = threading.Timer(SECONDS, _hang_up, (secure,))  # a byte now and then must not hold a thread for ever
    late.start()
    try:
        secure.do_handshake()
        connection = http.client.HTTPConnection(host, timeout=SECONDS)
        connection.auto_open, connection.sock = 0, secure
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise _refused(field, f"was answered with {reply.status}; redirects are not followed")
        data = reply.read(max_bytes + 1)
        if not late.is_alive():  # what came until then may look whole
            raise _refused(field, f"took longer than {SECONDS:g} s")
    finally:
        late.cancel()
        secure.close()
    if len(data) > max_bytes or reply.length:  # `length`: what is missing of the announced body
        raise _refused(field, f"must be a whole picture of at most {max_bytes} bytes")
    return data


def _hang_up(secure: ssl.SSLSocket) -> None:
    with suppress(OSError):  # it has ended
        socket.socket.shutdown(secure, socket.SHUT_RDWR)  # the TCP connection's: TLS would say goodbye first


def _refused(field: str, message: str) -> ApiError:
    return invalid(field, message, "invalid_image")
