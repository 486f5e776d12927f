"""How idle OpenMP threads wait: awake on a quiet machine, asleep where others want the cores. Changes as they come.

GNU's OpenMP reads once how long a thread spins before it sleeps, but lets none spin for more than some hundred rounds
while a process has more of its threads than there are cores. So a team that does nothing is the switch.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch

from vllm_omni.envs import SPINS

CHECK_S = 0.5
CROWDED, QUIET = 0.3, 0.1  # seconds that threads were ready to run and had no core, for each that they ran
LEAST_RUN_S = 0.05  # in which something shows
CALM_CHECKS = 3  # in a row, before threads stay awake again
SHARED = 2**17  # elements of which torch gives each thread a part


def wait_politely() -> None:
    """Watch from now on, in a thread, whether others want the cores; unless an operator has said how threads wait."""
    ours = os.environ.get("GOMP_SPINCOUNT") == str(SPINS) and "OMP_WAIT_POLICY" not in os.environ
    if ours and torch.get_num_threads() > 1 and Path("/proc/self/task").is_dir():
        threading.Thread(target=_watch, args=(Crowd(),), name="vllm-omni-waiting", daemon=True).start()


class Crowd:
    """Threads of OpenMP that make more than there are cores, once `gather` was called and until `leave`."""

    def __init__(self) -> None:
        self._leave: threading.Event | None = None

    @property
    def there(self) -> bool:
        return self._leave is not None

    def gather(self) -> None:
        """From now on, idle threads sleep."""
        self._leave = leave = threading.Event()

        def be_there() -> None:
            torch.zeros(SHARED).add_(1)
            leave.wait()

        threading.Thread(target=be_there, name="vllm-omni-crowd", daemon=True).start()

    def leave(self) -> None:
        """From now on, idle threads wait awake."""
        if self._leave is not None:
            self._leave.set()
            self._leave = None


def _watch(crowd: Crowd) -> None:
    calm, before = 0, ran_and_waited()
    while True:
        time.sleep(CHECK_S)
        now = ran_and_waited()
        ran, waited = now[0] - before[0], now[1] - before[1]
        before = now
        if ran + waited < LEAST_RUN_S:
            continue
        calm = calm + 1 if waited < QUIET * ran else 0
        if not crowd.there and waited > CROWDED * ran:
            crowd.gather()
        elif crowd.there and calm >= CALM_CHECKS:
            crowd.leave()


def ran_and_waited() -> tuple[float, float]:
    """Seconds that this process's threads have run, and been ready without a core; of threads that have not ended."""
    ran = waited = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = (task / "schedstat").read_text(encoding="ascii").split()
        except OSError:  # it has just ended
            continue
        ran, waited = ran + int(fields[0]), waited + int(fields[1])
    return ran / 1e9, waited / 1e9
