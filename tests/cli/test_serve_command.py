"""The real command, from start to SIGTERM: a picture, a span, JSON lines, the open sockets, and nothing left behind.

Also under load, and where it cannot start.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from paths import ROOT
from waiting import until

VLLM = Path(sys.executable).with_name("vllm")
AUTH = {"Authorization": "Bearer sk-marker-of-a-key"}
KEY, PROMPT = "sk-marker-of-a-key", "marker prompt red apple"
TRACE = "0af7651916cd43dd8448eb211c80319c"
pytestmark = pytest.mark.skipif(not VLLM.exists(), reason="no vLLM beside this Python; tools/setup.sh installs it")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP collector: its address, and the bodies it was sent."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def listening(pids: list[int]) -> set[str]:
    """Local addresses, in hexadecimal, of the listening TCP sockets of these processes."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if entry.exists() and (match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))):
                inodes.add(match[1])
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1] for line in lines if line[3] == "0A" and line[9] in inodes}


def spans(bodies: list[bytes]) -> list[dict[str, object]]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    told = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in [span for scope in resource.scope_spans for span in scope.spans]:
                values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                told.append({"name": span.name, "trace": span.trace_id.hex()} | values)
    return told


@contextmanager
def started(folder: Path, *flags: str, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`vllm serve demo --omni` and its URL; its log is folder/log, and its temporary files are in folder/scratch."""
    port = free_port()
    (folder / "scratch").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "scratch"), "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    words = [VLLM, "serve", "demo", "--omni", "--cache-backend", "magcache", "--port", str(port), *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment | variables, cwd=folder)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def left_behind(folder: Path, pids: list[int], shared_memory: set[str]) -> list[str]:
    """Processes, files and sockets, and names of shared memory that are there after the end."""
    files = [str(path) for path in (folder / "scratch").rglob("*") if path.is_file() or path.is_socket()]
    return [*(f"/proc/{pid}" for pid in pids if Path(f"/proc/{pid}").exists()), *files,
            *(set(os.listdir("/dev/shm")) - shared_memory)]  # fmt: skip


def answer(url: str, steps: int) -> tuple[int, str]:
    """Status and code of the error; 0 where no answer came."""
    body = {"prompt": "x", "cache": "off", "steps": steps}
    try:
        reply = httpx.post(url + "/v1/images/generations", json=body, headers=AUTH, timeout=60)
    except httpx.TransportError:
        return 0, ""
    return reply.status_code, reply.json().get("error", {}).get("code", "")


IN_FLIGHT = ('running{model_name="demo"} 16', 'waiting{model_name="demo"} 8')


def sigterm_under_load(
    process: subprocess.Popen[bytes], url: str, steps: int, within_s: float
) -> list[tuple[int, str]]:
    """The answers of 16 requests that ran and 8 that waited when the server was told to end; nothing new was taken."""
    with ThreadPoolExecutor(24) as pool:
        load = [pool.submit(answer, url, steps) for _ in range(24)]
        for _ in range(1000):
            gauges = httpx.get(url + "/metrics", headers=AUTH).text
            if all(f"num_requests_{gauge}.0" in gauges for gauge in IN_FLIGHT):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        late = answer(url, steps=1)
        code = process.wait(within_s)
        told = [future.result() for future in load]
    assert late in ((503, "draining"), (0, "")) and code == 0
    return told


@pytest.mark.alone
@pytest.mark.slow
def test_the_command_serves_logs_traces_and_ends_without_leftovers(
    tmp_path: Path, collector: tuple[str, list[bytes]]
) -> None:
    endpoint, bodies = collector
    shm = set(os.listdir("/dev/shm"))
    flags = ("--log-json", "--otlp-traces-endpoint", endpoint)
    secret = {"VLLM_API_KEY": KEY, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with started(tmp_path, *flags, **secret) as (process, url):
        client = OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=30)
        made = client.images.with_raw_response.generate(
            prompt=PROMPT,
            extra_body={"seed": 1, "steps": 12},
            extra_headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        )
        assert made.parse().data[0].b64_json and made.parse().usage.input_tokens_details.text_tokens > 3
        (omni,) = made.parse().model_extra["omni"]["images"]
        assert httpx.get(url + "/v1/models").status_code == 401
        with httpx.Client(base_url=url) as kept:
            took = [kept.get("/v1/models").elapsed.total_seconds() for _ in range(10)]
        assert min(took[1:]) < 0.02, "a reply on a connection that is kept waits for a delayed acknowledgement"
        pids = family(process.pid)
        assert len(pids) >= 2
        assert not any(KEY.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
        assert listening(pids) == {f"0100007F:{int(url.rpartition(':')[2]):04X}"}
        assert sigterm_under_load(process, url, steps=24, within_s=120) == [(200, "")] * 24  # the queued ones too
    log_text = (tmp_path / "log").read_text()
    assert left_behind(tmp_path, pids, shm) == [], log_text
    assert KEY not in log_text and PROMPT not in log_text
    ours = [json.loads(line) for line in log_text.splitlines() if line.startswith("{")]
    replies = [line for line in ours if line.get("route") == "/v1/images/generations"]
    assert [line["status"] for line in replies].count(200) == 25 and len(replies) == 26, log_text
    assert replies[0]["request_id"] == made.headers["x-request-id"]
    (span,) = [span for span in spans(bodies) if span.get("gen_ai.request.id") == made.headers["x-request-id"]]
    assert span["trace"] == TRACE and span["name"] == "POST /v1/images/generations"
    assert span["vllm_omni.computed_steps"] == replies[0]["computed_steps"] == omni["computed_steps"] > 0
    assert span["vllm_omni.skipped_steps"] == omni["skipped_steps"]
    assert not any(PROMPT.encode() in body for body in bodies)
    serving, ready = (
        next(line for line in ours if line["message"].startswith(m)) for m in ("serving", "the engine is")
    )
    between = datetime.fromisoformat(ready["time"]) - datetime.fromisoformat(serving["time"])
    load_s = float(ready["message"].split()[-2])
    assert between.total_seconds() < load_s, "the engine loads while vLLM is imported"
    plain = [line for line in log_text.splitlines() if not line.startswith("{")]
    assert not any("vllm_omni" in line or "uvicorn" in line for line in plain), plain


@pytest.mark.alone
@pytest.mark.slow
def test_requests_beyond_the_shutdown_timeout_are_refused(tmp_path: Path) -> None:
    """Long requests, and one second for them: the client is sent elsewhere, and the server ends."""
    shm = set(os.listdir("/dev/shm"))
    with started(tmp_path, "--shutdown-timeout", "1") as (process, url):
        until(lambda: process.poll() is not None or answer(url, steps=1) == (200, ""), 300, pause_s=0.1)
        assert process.poll() is None, (tmp_path / "log").read_text()
        pids = family(process.pid)
        assert sigterm_under_load(process, url, steps=200, within_s=60) == [(503, "draining")] * 24
    log_text = (tmp_path / "log").read_text()
    assert left_behind(tmp_path, pids, shm) == [] and "Traceback" not in log_text, log_text


@pytest.mark.slow
def test_a_port_in_use_is_reported_before_vllm_is_imported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with started(tmp_path, "--port", port, PYTHONPROFILEIMPORTTIME="1") as (process, _):
            assert process.wait(120) == 2
    lines = (tmp_path / "log").read_text().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "vllm_omni.entrypoints.cli.serve_flags" in imported and "vllm.engine.arg_utils" not in imported
    ours = [line for line in lines if "vllm-omni" in line]
    assert ours == [f"vllm-omni serve: --port cannot be used (Address already in use), got '127.0.0.1:{port}'"]
    assert left_behind(tmp_path, [], set(os.listdir("/dev/shm"))) == []


@pytest.mark.alone
@pytest.mark.slow
def test_an_unknown_flag_ends_the_engine_that_is_loading(tmp_path: Path) -> None:
    """The engine has begun to load by then; nothing is left of it."""
    seen: set[int] = set()
    shm = set(os.listdir("/dev/shm"))
    with started(tmp_path, "--uvicorn-log-level", "loud") as (process, _):

        def ended() -> bool:
            seen.update(family(process.pid))
            return process.poll() is not None

        until(ended, 300, pause_s=0.05)
    assert process.returncode == 2 and "--uvicorn-log-level" in (tmp_path / "log").read_text()
    assert len(seen) >= 2
    until(lambda: left_behind(tmp_path, list(seen), shm) == [], 20)
