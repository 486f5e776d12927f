"""Runs commands in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paths import ROOT

REFUSED = """import json, sys
from vllm_omni.entrypoints.cli.main import main
for words in json.loads(sys.argv[1]):
    try: code = main(words)
    except SystemExit as error: code = error.code
    assert code == 2, words
    assert not {'vllm', 'torch'} & set(sys.modules), words
"""


def run(words: Sequence[str | Path], path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=240, env=environment)


def refused(lines: Sequence[str | list[str]]) -> list[str]:
    """What each command line is refused with, in one line and before torch and vLLM are imported."""
    words = [line.split() if isinstance(line, str) else line for line in lines]
    ran = run([sys.executable, "-c", REFUSED, json.dumps(words)])
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if line.startswith(("vllm-omni ", "vllm serve: "))]
    assert len(told) == len(words), ran.stderr
    return told
