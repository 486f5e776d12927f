"""Page faults of a batch that is run again: where freed memory is kept, as in our processes, and where it is not."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import json, resource, sys
from vllm_omni import Omni, OmniDiffusionSamplingParams as Params
whose, arguments, prompts, steps = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:])
if whose == "ours":
    from vllm_omni.engine.malloc import keep_freed_memory
    keep_freed_memory()
with Omni(**arguments) as omni:
    asked = [Params(num_inference_steps=steps, seed=i) for i in range(prompts)]
    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        omni.generate(["x"] * prompts, asked, use_tqdm=False)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    first, *again = [run() for _ in range(6)]
    print(min(again) if whose == "ours" else max(again))
"""


def another_allocator() -> bool:
    """Whether faults tell nothing here: not glibc's heap, or pages so large that there are hardly any."""
    huge = HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()
    return huge or torch.cuda.is_available() or platform.libc_ver()[0] != "glibc"


counted = pytest.mark.skipif(another_allocator(), reason="another allocator, or huge pages everywhere")


def faults(whose: str, arguments: dict[str, Any], prompts: int, steps: int) -> int:
    """Of a process that is "ours" or "a user's"."""
    line = [sys.executable, "-c", FAULTS, whose, json.dumps(arguments), str(prompts), str(steps)]
    run = subprocess.run(line, capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1])
