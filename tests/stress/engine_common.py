"""What the stress scripts share: requests of all kinds, and what a process holds."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

ARGS: dict[str, Any] = {"model": "demo", "cache_backend": "magcache", "max_num_seqs": 16}
CAPTIONS = (Path(__file__).resolve().parents[2] / "vllm_omni/assets/demo/captions.txt").read_text().splitlines()
CACHES: list[Any] = [None, "off", "fast", "balanced", "high", {"speedup": 2.0}, {"threshold": 0.1}, {"nfe": 4}]


def some_request(dice: random.Random, most_steps: int = 24) -> tuple[str, dict[str, Any]]:
    """A caption, and parameters of any size, length, seed, guidance and cache setting."""
    return dice.choice(CAPTIONS), {
        "seed": dice.randrange(2**32),
        "num_inference_steps": dice.randint(4, most_steps),
        "height": dice.choice((32, 48, 64, 64, 64, 96)),
        "width": dice.choice((32, 48, 64, 64, 64, 96)),
        "guidance_scale": dice.choice((1.0, 2.5, 3.5, 7.0)),
        "cache": dice.choice(CACHES),
        "num_outputs_per_prompt": dice.choice((1, 1, 1, 2)),
    }


def rss_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def holds(pid: int) -> dict[str, int]:
    """Open files and threads of a process."""
    return {name: len(os.listdir(f"/proc/{pid}/{kind}")) for name, kind in (("fds", "fd"), ("threads", "task"))}


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, dead ones that were not reaped included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def shared_memory(pid: int) -> set[str]:
    """Files of shared memory that a process has open or mapped."""
    root = Path(f"/proc/{pid}")
    mapped = {line.split(maxsplit=5)[5] for line in (root / "maps").read_text().splitlines() if "/dev/shm/" in line}
    return mapped | {str(name) for f in (root / "fd").iterdir() if (name := f.readlink()).is_relative_to("/dev/shm")}


def socket_files() -> set[str]:
    """Every UNIX socket of this machine that has a path."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {parts[7] for line in lines if len(parts := line.split()) > 7}


def percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 5) if values else 0.0
