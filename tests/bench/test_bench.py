"""`vllm-omni bench` against a plain server that speaks the API, and against ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from waiting import until

from vllm_omni.bench.client import Client, Target
from vllm_omni.bench.load import closed, open_loop
from vllm_omni.entrypoints.cli.main import main

PICTURE = {"b64_json": "iVBORw0KGgo="}


class Plain(ThreadingHTTPServer):
    """Answers each prompt in its own way, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.connections = 0
        self.polls: dict[str, int] = {}
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        self.together = threading.Barrier(4, timeout=60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Plain

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._reply(200, {"data": [{"id": "plain"}]})
        job = self.path.split("/")[3]
        if self.path.endswith("/content"):
            return self._reply(200, {"bytes": "of a video"})
        self.server.polls[job] = self.server.polls.get(job, 0) + 1
        done = self.server.polls[job] >= 2
        if job == "bad":
            return self._reply(200, {"id": job, "status": "failed", "error": {"code": "engine_error"}})
        self._reply(200, {"id": job, "status": "completed" if done else "in_progress"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self._answer(body)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        if self.path == "/v1/chat/completions":
            part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
            return self._reply(200, {"choices": [{"message": {"content": [{"type": "text", "text": "x"}, part]}}]})
        prompt = body["prompt"]
        if self.path == "/v1/videos":
            return self._reply(200, {"id": "bad" if prompt == "fail" else "job", "status": "queued"})
        if prompt == "busy":
            return self._reply(503, {"error": {"code": "queue_full", "message": "come back"}})
        if prompt == "empty":
            return self._reply(200, {"data": []})
        if prompt == "html":
            return self._reply(200, b"<html>")
        if prompt == "teapot":
            return self._reply(418, b"short and stout")
        if prompt == "hang up":
            self.close_connection = True
            return None
        if prompt == "together":  # answered when four such requests are there
            self.server.together.wait()
        time.sleep(0.3 if prompt == "slow" else 0.02)
        self._reply(200, {"data": [PICTURE] * body.get("n", 1)}, close=prompt == "close")

    def _reply(self, status: int, content: dict[str, Any] | bytes, close: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = close  # without saying so: the next request finds a closed connection

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def plain() -> Iterator[Plain]:
    server = Plain()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def ask(plain: Plain, prompt: str, timeout_s: float = 10.0, **more: Any) -> tuple[int, str]:
    client = Client(Target(plain.url, timeout_s=timeout_s, **more))
    try:
        outcome = client.ask({"prompt": prompt})
    finally:
        client.close()
    return outcome.pictures, outcome.error


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("fine", ""),
        ("busy", "503 queue_full"),
        ("teapot", "418"),
        ("empty", "no picture"),
        ("html", "not JSON"),
        ("hang up", "RemoteDisconnected"),
    ],
)
def test_errors_have_a_kind(plain: Plain, prompt: str, error: str) -> None:
    assert ask(plain, prompt) == (0 if error else 1, error)


def test_a_reply_that_does_not_come_is_a_timeout(plain: Plain) -> None:
    assert ask(plain, "slow", timeout_s=0.1) == (0, "timeout")


def test_a_server_that_is_not_there() -> None:
    client = Client(Target("http://127.0.0.1:1"))
    assert client.ask({"prompt": "x"}).error == "ConnectionRefusedError"


def test_videos_are_waited_for(plain: Plain) -> None:
    assert ask(plain, "fine", api="videos") == (1, "")
    assert plain.polls["job"] == 2
    assert ask(plain, "fail", api="videos") == (0, "failed engine_error")


def test_a_closed_loop_has_so_many_clients_and_keeps_their_connections(plain: Plain) -> None:
    samples = closed(Target(plain.url), [{"prompt": "together"}] * 20, clients=4)
    assert len(samples) == 20 and all(sample.pictures == 1 for sample in samples)
    assert plain.most == 4 == plain.connections
    assert all(sample.latency_s >= 0.02 for sample in samples)


def test_a_connection_that_the_server_closed_is_opened_again(plain: Plain) -> None:
    samples = closed(Target(plain.url), [{"prompt": "close"}] * 5, clients=1)
    assert [sample.error for sample in samples] == [""] * 5 and len(plain.bodies) == 5


def test_an_open_loop_does_not_wait_for_replies(plain: Plain) -> None:
    """The first of four is answered when the last is there."""
    times = [0.0, 0.05, 0.1, 0.15]
    samples = open_loop(Target(plain.url), [{"prompt": "together"}] * 4, times)
    assert sorted(sample.due for sample in samples) == times
    assert plain.most == 4 and all(sample.ended >= 0.17 and not sample.error for sample in samples)


def test_the_command_against_a_plain_server(
    plain: Plain, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (tmp_path / "prompts.txt").write_text("fine\nfine\nfine\nbusy\n")
    words = ["bench", plain.url + "/v1/", "--clients", "2", "4", "--rate", "100", "--requests", "16", "--warmup", "1"]
    words += ["--steps", "10:3", "20", "--size", "64x64", "--cache", "off", "fast", "--n", "2", "--deadline", "5"]
    words += [
        "--extra",
        '{"user": "me"}',
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "o.json"),
    ]
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()
    line = json.loads(told[-1])
    assert [(load["loop"], load["amount"]) for load in line["loads"]] == [("closed", 2), ("closed", 4), ("open", 100.0)]
    assert line["model"] == "plain"
    for load in line["loads"]:
        assert (load["succeeded"], load["errors"]) == (12, {"503 queue_full": 4})
        assert load["goodput_share"] == 0.75 and load["pictures_per_s"] > load["requests_per_s"] > 0
        assert load["percentiles_s"].keys() == {"p50", "p90", "p95", "p99"}
    assert "2 clients: 4 x 503 queue_full" in told
    asked = plain.bodies[1:17]
    assert set(plain.keys) == {"Bearer secret"} and len(plain.bodies) == 49
    assert [body["num_inference_steps"] for body in asked].count(10) == 12
    assert sorted(body["seed"] for body in asked) == list(range(16))
    assert {body["cache"] for body in asked} == {"off", "fast"}
    fixed = {"model": "plain", "size": "64x64", "n": 2, "user": "me", "response_format": "b64_json"}
    assert all(body.items() >= fixed.items() for body in asked)
    kept = json.loads((tmp_path / "o.json").read_text())
    assert [len(samples) for samples in kept["samples"]] == [16, 16, 16]


def test_nothing_is_sent_that_was_not_asked_for(plain: Plain) -> None:
    assert main(["bench", plain.url, "--requests", "1", "--warmup", "0", "--api", "chat", "--model", "m"]) == 0
    assert plain.bodies == [{"model": "m", "messages": [{"role": "user", "content": "red apple"}]}]


@pytest.mark.parametrize("load", [["--clients", "2"], ["--rate", "20"]])
def test_what_was_measured_until_ctrl_c_is_summarised(plain: Plain, tmp_path: Path, load: list[str]) -> None:
    """Although one request is not answered for a minute."""
    (tmp_path / "prompts.txt").write_text("together\n" + "fine\n" * 7)
    command = [sys.executable, "-m", "vllm_omni", "bench", plain.url, "--prompts", str(tmp_path / "prompts.txt")]
    command += [*load, "--requests", "1000", "--warmup", "0"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    until(lambda: len(plain.bodies) > 6)
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=50)
    assert running.returncode == 130
    assert "Traceback" not in error and error.splitlines()[-1] == "vllm-omni bench: interrupted"
    (summary,) = json.loads(out.splitlines()[-1])["loads"]
    assert 0 < summary["succeeded"] == summary["requests"] < len(plain.bodies) < 100 and summary["mean_s"] > 0


def test_a_load_of_which_nothing_succeeds_is_a_failure(
    plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "busy.txt").write_text("busy\n")
    assert main(["bench", plain.url, "--requests", "2", "--prompts", str(tmp_path / "busy.txt")]) == 1
    assert last_line(capsys)["loads"][0]["mean_s"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ftp://x"], "URL must be an address"),
        (["http://h:99999"], "URL must be an address"),
        (["http://h:0"], "URL must be an address"),
        (["http://x", "--model", "m", "--steps", "20000"], "--steps must be a whole number from 1 to 10000"),
        (["http://127.0.0.1:1"], "is the server up?"),
        (["http://x", "--clients", "0"], "--clients must be above 0"),
        (["http://x", "--rate", "nan"], "--rate must be above 0"),
        (["http://x", "--requests", "0"], "--requests must be above 0"),
        (["http://x", "--model", "m", "--steps", "ten"], "--steps must be a whole number"),
        (["http://x", "--model", "m", "--steps", "10:0"], "--steps must be VALUE or VALUE:WEIGHT"),
        (["http://x", "--model", "m", "--size", "64"], "--size must be WIDTHxHEIGHT"),
        (["http://x", "--model", "m", "--extra", "{"], "--extra must be JSON"),
        (["http://x", "--model", "m", "--prompts", "/none"], "--prompts must be a text file"),
    ],
)
def test_bad_input_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_command_against_our_server(capsys: pytest.CaptureFixture[str]) -> None:
    from http_server import serve

    with serve(max_queued_requests=1) as server:  # four run and one waits
        words = ["bench", server.url, "--clients", "4", "--rate", "inf", "--requests", "8", "--steps", "2", "6"]
        assert main([*words, "--size", "64x64", "--cache", "off", "fast"]) == 0
        made = last_line(capsys)["loads"]
        assert main(["bench", server.url, "--api", "chat", "--clients", "2", "--requests", "2"]) == 0
        chat = last_line(capsys)["loads"]
    assert made[0]["succeeded"] == 8 and made[0]["pictures_per_s"] > 0
    assert made[1]["errors"] == {"503 queue_full": 8 - made[1]["succeeded"]} and made[1]["succeeded"] >= 5
    assert chat[0]["succeeded"] == 2


@pytest.mark.slow
def test_the_command_against_our_server_of_videos(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from http_server import serve, video_folder

    with serve({"model": str(video_folder(tmp_path)), "max_num_seqs": 4}) as server:
        words = ["bench", server.url, "--api", "videos", "--clients", "2", "--requests", "4", "--steps", "2"]
        assert main([*words, "--size", "32x32", "--extra", '{"num_frames": 5}', "--warmup", "0"]) == 0
    load = last_line(capsys)["loads"][0]
    assert (load["succeeded"], load["errors"]) == (4, {})
