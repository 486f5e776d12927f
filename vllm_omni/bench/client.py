"""A client of an OpenAI-compatible server: one connection, one request at a time, and what came of it."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

IMAGES, CHAT, VIDEOS = "images", "chat", "videos"
APIS = {IMAGES: "/v1/images/generations", CHAT: "/v1/chat/completions", VIDEOS: "/v1/videos"}
POLL_S = 0.25  # between two looks at a video job


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    url: str
    api: str = IMAGES
    api_key: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            whole = False
        if not whole:
            raise ValueError("must be an address such as http://127.0.0.1:8000")

    @property
    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", "Accept": "application/json"} | key


@dataclass(frozen=True)
class Outcome:
    """How many pictures or videos came, or the kind of error."""

    pictures: int = 0
    error: str = ""


class Client:
    """One keep-alive connection to a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        parts = urlsplit(target.url)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._host, self._port, self._secure = parts.hostname or "", parts.port, parts.scheme == "https"
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, body: dict[str, Any]) -> Outcome:
        """Send a request of the target's API and wait for all of its pictures; errors are outcomes."""
        try:
            reply = self._send("POST", APIS[self.target.api], body)
            if self.target.api == VIDEOS:
                return self._video(reply)
            return Outcome(pictures_of(reply))
        except _Refused as refused:
            return Outcome(error=str(refused))
        except TimeoutError:
            self.close()
            return Outcome(error="timeout")
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Outcome(error=type(error).__name__)

    def model(self) -> str:
        """The first model that the server lists. OSError or ValueError if it lists none."""
        try:
            listed = self._send("GET", "/v1/models", None)
            return str(listed["data"][0]["id"])
        except (_Refused, http.client.HTTPException, LookupError, TypeError) as error:
            raise ValueError(f"lists no model ({error})") from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _video(self, job: dict[str, Any]) -> Outcome:
        """Wait for a job and fetch its file."""
        deadline = time.monotonic() + self.target.timeout_s
        while job.get("status") not in ("completed", "failed"):
            if time.monotonic() > deadline:
                return Outcome(error="timeout")
            time.sleep(POLL_S)
            job = self._send("GET", f"{APIS[VIDEOS]}/{job.get('id')}", None)
        if job["status"] == "failed":
            return Outcome(error=f"failed {_code(job)}".strip())
        return Outcome(1 if self._receive("GET", f"{APIS[VIDEOS]}/{job['id']}/content", None) else 0)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        content = self._receive(method, path, body)
        try:
            reply = json.loads(content)
        except ValueError:
            raise _Refused("not JSON") from None
        if not isinstance(reply, dict):
            raise _Refused("not a JSON object")
        return reply

    def _receive(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """The content of a reply with status 2xx. A connection that the server closed meanwhile is opened again."""
        data = None if body is None else json.dumps(body).encode()
        for fresh in (self._connection is None, True):
            connection = self._connect()
            try:
                connection.request(method, self._prefix + path, data, self.target.headers)
                response = connection.getresponse()
                content = response.read()
                break
            except (ConnectionError, http.client.RemoteDisconnected, http.client.BadStatusLine):
                self.close()
                if fresh:
                    raise
        if response.will_close:
            self.close()
        if not 200 <= response.status < 300:
            raise _Refused(f"{response.status} {_code_of(content)}".strip())
        return content

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is None:
            timeout = self.target.timeout_s
            if self._secure:
                context = ssl.create_default_context()
                self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=context)
            else:
                self._connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        return self._connection


class _Refused(Exception):
    """A reply that is not what was asked for; its text is the kind of error."""


def pictures_of(reply: dict[str, Any]) -> int:
    """The number of pictures in a reply of the images or the chat API. `_Refused` if there is none."""
    count = 0
    for entry in _dicts(reply.get("data")):
        count += bool(entry.get("b64_json") or entry.get("url"))
    for choice in _dicts(reply.get("choices")):
        message = choice.get("message")
        if isinstance(message, dict):
            count += _in_message(message)
    if count == 0:
        raise _Refused("no picture")
    return count


def _in_message(message: dict[str, Any]) -> int:
    """Pictures in a chat message: parts of its content, its `images`, or data URLs in its text."""
    content = message.get("content")
    if isinstance(content, str):
        return content.count("data:image/") or len(_dicts(message.get("images")))
    return sum(part.get("type") == "image_url" for part in _dicts(content)) + len(_dicts(message.get("images")))


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _code_of(content: bytes) -> str:
    try:
        return _code(json.loads(content))
    except ValueError:
        return ""


def _code(reply: Any) -> str:
    """The code (or the type) of an error in the usual envelope; empty if it has none."""
    error = reply.get("error") if isinstance(reply, dict) else None
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
