"""Commands that cannot serve: each ends with one clear line within ten seconds, and nothing is left.

PYTHONPATH=.:tests/helpers python tests/stress/http_start_faults.py

`vllm serve` imports vLLM before anything else, whatever is wrong; how long that takes is measured beside the faults
(`vllm --version`). The last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_common as common
import engine_start_faults as faults
import http_common as web

from vllm_omni.model_folder import ASSETS

LIMIT_S = 10.0
PROFILE = '{"profile": "no-such-profile"}'
FAULTS = ("no folder", "a part is missing", "weights are truncated", "wrong shape, denoiser")


def run(words: list[str], folder: Path) -> tuple[float, int, list[str], list[str]]:
    """Seconds, exit code, our lines of the log, and what is left of it."""
    scratch = folder / "scratch"
    scratch.mkdir()
    shm, before = set(os.listdir("/dev/shm")), set(common.children(os.getpid()))
    environment = os.environ | {"PYTHONPATH": str(web.ROOT), "TMPDIR": str(scratch), "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.monotonic()
    ran = subprocess.run([str(web.VLLM), *words], capture_output=True, text=True, env=environment, cwd=folder)
    seconds = time.monotonic() - began
    left = [str(path) for path in scratch.rglob("*") if path.is_file() or path.is_socket()]
    left += set(os.listdir("/dev/shm")) - shm
    left += map(str, set(common.children(os.getpid())) - before)
    lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("vllm-omni") or "Trace" in line]
    return round(seconds, 1), ran.returncode, lines, left


def serve(*words: str) -> list[str]:
    return ["serve", *words, "--omni", "--cache-backend", "magcache"]


def main() -> dict[str, Any]:
    ends: dict[str, tuple[float, int, list[str], list[str]]] = {}
    with tempfile.TemporaryDirectory() as base, socket.create_server(("127.0.0.1", 0)) as taken:
        number = iter(range(100))

        def one(name: str, words: list[str]) -> None:
            folder = Path(base) / str(next(number))
            folder.mkdir()
            ends[name] = run(words, folder)

        def broken(name: str, damage: Callable[[Path], Any]) -> None:
            model = Path(base) / name.replace(" ", "-")
            shutil.copytree(ASSETS / "demo", model)
            damage(model)
            one(name, serve(str(model), "--port", str(web.free_port())))

        folder = Path(base) / "version"
        folder.mkdir()
        bare = run(["--version"], folder)[0]
        one("port in use", serve("demo", "--port", str(taken.getsockname()[1])))
        one("no such profile", serve("demo", "--port", str(web.free_port()), "--cache-config", PROFILE))
        for name in FAULTS:
            broken(name, faults.FAULTS[name])
    good = all(
        code != 0 and len(lines) == 1 and "Trace" not in lines[0] and not left for _, code, lines, left in ends.values()
    )
    in_time = all(end[0] < LIMIT_S for end in ends.values())
    return {"vllm_alone_s": bare, "told": ends, "ok": good and in_time}


if __name__ == "__main__":
    told = main()
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)
