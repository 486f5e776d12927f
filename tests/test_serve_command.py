"""The real command, from start to SIGTERM: a picture, a span, JSON lines, the open sockets, and nothing left behind."""

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
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
VLLM = Path(sys.executable).with_name("vllm")
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


def test_from_start_to_end(tmp_path: Path, collector: tuple[str, list[bytes]]) -> None:
    endpoint, bodies = collector
    port, scratch = free_port(), tmp_path / "scratch"
    scratch.mkdir()
    shm = set(os.listdir("/dev/shm"))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1",
        "VLLM_API_KEY": KEY,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }  # fmt: skip
    words = [
        "serve",
        "demo",
        "--omni",
        "--cache-backend",
        "magcache",
        "--port",
        str(port),
        "--log-json",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [VLLM, *words, "--otlp-traces-endpoint", endpoint], stdout=log, stderr=log, env=environment, cwd=tmp_path
        )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=30)
        made = client.images.with_raw_response.generate(
            prompt=PROMPT,
            extra_body={"seed": 1, "steps": 12},
            extra_headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        )
        assert made.parse().data[0].b64_json and made.parse().usage.input_tokens_details.text_tokens > 3
        (omni,) = made.parse().model_extra["omni"]["images"]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as kept:
            took = [kept.get("/v1/models").elapsed.total_seconds() for _ in range(10)]
        assert min(took[1:]) < 0.02, "a reply on a connection that is kept waits for a delayed acknowledgement"
        pids = family(process.pid)
        assert len(pids) >= 2
        assert not any(KEY.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
        assert listening(pids) == {f"0100007F:{port:04X}"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    log_text = (tmp_path / "log").read_text()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == [], log_text
    left = [path for path in scratch.rglob("*") if path.is_file() or path.is_socket()]
    assert left == [] and set(os.listdir("/dev/shm")) <= shm
    assert KEY not in log_text and PROMPT not in log_text
    ours = [json.loads(line) for line in log_text.splitlines() if line.startswith("{")]
    replies = [line for line in ours if line.get("route") == "/v1/images/generations"]
    assert [line["request_id"] for line in replies] == [made.headers["x-request-id"]], log_text
    (span,) = [span for span in spans(bodies) if span["name"] == "POST /v1/images/generations"]
    assert span["trace"] == TRACE and span["gen_ai.request.id"] == made.headers["x-request-id"]
    assert span["vllm_omni.computed_steps"] == replies[0]["computed_steps"] == omni["computed_steps"] > 0
    assert span["vllm_omni.skipped_steps"] == omni["skipped_steps"]
    assert not any(PROMPT.encode() in body for body in bodies)
    plain = [line for line in log_text.splitlines() if not line.startswith("{")]
    assert not any("vllm_omni" in line or "uvicorn" in line for line in plain), plain
