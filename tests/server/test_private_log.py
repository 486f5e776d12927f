"""The log of the real command: no prompt, no address that a client made up, and only JSON if that is asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from http_server import CHAT, GENERATIONS, PROCESS_KEY, command
from lanes import full_set

from vllm_omni.logger import told

pytestmark = pytest.mark.slow
MARKER = "PRIVATE-MARKER"
LONG = "word " * 40 + f"{MARKER} the patient's name is on the list"
AUTH = {"Authorization": f"Bearer {PROCESS_KEY}"}


@pytest.mark.parametrize(
    "words", [pytest.param(("--log-json",), marks=full_set), ("--log-json", "--uvicorn-log-level", "trace"), ()]
)
def test_no_prompt_and_no_address_of_a_header_is_logged(tmp_path: Path, words: tuple[str, ...]) -> None:
    debug = {"VLLM_OMNI_LOG_LEVEL": "DEBUG", "DIFFUSERS_VERBOSITY": "info", "TRANSFORMERS_VERBOSITY": "info"}
    with command(tmp_path, "demo", "--api-key", PROCESS_KEY, *words, **debug) as server:
        lured = AUTH | {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "javascript", "Forwarded": "for=6.6.6.6"}
        with httpx.Client(base_url=server.url, headers=lured, timeout=60) as client:
            fields = {"size": "64x64", "steps": 1}
            assert client.post(GENERATIONS, json={"prompt": LONG, **fields}).status_code == 200
            chat = {"messages": [{"role": "user", "content": LONG}], **fields}
            assert client.post(CHAT, json=chat).status_code == 200
            for wrong in ({"prompt": LONG, "steps": 10**6}, {"prompt": LONG, "cache": MARKER}, {"prompt": [MARKER]},
                          {"prompt": LONG, "user": MARKER * 99}, {"prompt": LONG, MARKER: 1},
                          {"prompt": LONG, "lora": MARKER}):  # fmt: skip
                assert client.post(GENERATIONS, json=wrong).status_code == 400
            assert client.post(GENERATIONS, content=f'{{"prompt": "{MARKER}"').status_code == 400
            assert client.get("/v1/models", params={"prompt": MARKER}).status_code == 200
            assert client.get(f"/{MARKER}").status_code == 404
    log = server.log.read_text()
    assert MARKER.lower() not in re.sub(rf"(GET )?/{MARKER}", "", log).lower() and "6.6.6.6" not in log
    assert "127.0.0.1" in log
    if words:
        lines = [json.loads(line) for line in log.splitlines()]
        assert len(lines) > 10 and all({"time", "level", "logger", "message"} <= set(line) for line in lines)


def test_an_error_is_told_without_the_prompt() -> None:
    try:
        raise ValueError(f"cannot read {LONG.upper()!r}, nor 'cat', nor {LONG[30:260]}; İ out of memory")
    except ValueError as error:
        text = told(error, [LONG, "cat", ""])
        assert MARKER not in text and "patient" not in text.lower() and "'cat'" not in text
        assert "ValueError: cannot read" in text and "out of memory" in text and "raise ValueError" in text
        assert MARKER in told(error)


def test_all_that_the_engine_writes_is_json(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("""
import logging, sys, warnings
from vllm_omni.logger import init_logger, log_as_json
init_logger("vllm_omni.x")
log_as_json()
print("printed")
warnings.warn("warned")
logging.getLogger("foreign").warning("of another\\nlibrary")
init_logger("vllm_omni.x").warning("ours")
sys.stderr.write("partly")
raise RuntimeError("the end")
""")
    done = subprocess.run([sys.executable, tmp_path / "x.py"], capture_output=True, text=True)
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    messages = " ".join(line["message"] for line in lines)
    for word in ("printed", "warned", "library", "ours", "partly", "RuntimeError: the end"):
        assert word in messages
