"""SIGKILL of the engine process at random moments under load: every request ends once, the next ones succeed.

`python tests/stress/engine_kill.py [kills=20] [clients=16]`; the last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import engine_common as common

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.errors import EngineDeadError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params

READY_LIMIT_S = 15.0


class Load:
    """Clients that send one request after another; each request must have one end, of a known kind."""

    def __init__(self, client: ProcessEngineClient, dice: random.Random) -> None:
        self.client, self.dice, self.stop = client, dice, False
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.sent = 0

    async def run(self) -> None:
        while not self.stop:
            prompt, params = common.some_request(self.dice)
            self.sent += 1
            name, finished = f"kill-{self.sent}", 0
            try:
                async for output in self.client.generate(prompt, Params(**params), name):
                    if output.finished:
                        finished += 1
                        self.ends["ok" if output.ok else type(output.error).__name__] += 1
                        if not output.ok and "SIGKILL" not in str(output.error):
                            self.wrong.append(repr(output.error))
            except EngineDeadError:  # refused while there is no engine
                finished += 1
                self.ends["refused"] += 1
                await asyncio.sleep(0.2)
            if finished != 1:
                self.wrong.append(f"{name} ended {finished} times")


async def wait(condition: object, seconds: float) -> float:
    assert callable(condition)
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def main(kills: int, clients: int) -> int:
    dice = random.Random(7)
    shm: set[str] = set()
    sockets = common.socket_files()
    client = ProcessEngineClient(common.ARGS, max_restarts=1000)
    await client.start()
    first_pid, load = client._engine.process.pid, Load(client, dice)
    before, engine_before = common.holds(os.getpid()), common.holds(first_pid)
    tasks = [asyncio.create_task(load.run()) for _ in range(clients)]
    ready, success, failed_at = [], [], []
    for _ in range(kills):
        await asyncio.sleep(dice.uniform(0.2, 3.0))
        died, pid = load.ends["EngineDeadError"], client._engine.process.pid
        shm |= common.shared_memory(pid)
        os.kill(pid, signal.SIGKILL)
        await wait(lambda: not client.ready, 5)
        failed_at.append(await wait(lambda: load.ends["EngineDeadError"] > died, 10))  # noqa: B023
        ready.append(await wait(lambda: client.ready, 60))
        done = load.ends["ok"]
        success.append(await wait(lambda: load.ends["ok"] > done, 60))  # noqa: B023
    load.stop = True
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    after, engine_after = common.holds(os.getpid()), common.holds(client._engine.process.pid)
    alive = common.children(os.getpid())
    stats = await client.stats()
    await client.shutdown()
    result = {
        "kills": kills,
        "clients": clients,
        "sent": load.sent,
        "ends": dict(load.ends),
        "counted": stats.requests,
        "restarts": stats.restarts,
        "wrong": load.wrong[:5],
        "told_s_max": round(max(failed_at), 3),
        "ready_s_median": common.percentile(ready, 0.5),
        "ready_s_max": round(max(ready), 2),
        "first_success_s_max": round(max(success), 2),
        "front_end": [before, after],
        "engine": [engine_before, engine_after],
        "children_under_load": len(alive),
        "children_left": len(common.children(os.getpid())),
        "shared_memory_left": sum(Path(name).exists() for name in shm),
        "socket_files_left": len(common.socket_files() - sockets),
    }
    good = (
        not load.wrong
        and sum(load.ends.values()) == load.sent
        and stats.restarts == kills
        and max(ready) < READY_LIMIT_S
        and load.ends["ok"] > 0
        and after["fds"] <= before["fds"]
        and len(alive) == 1
        and not (result["children_left"] or result["shared_memory_left"] or result["socket_files_left"])
    )
    print(json.dumps(result | {"ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    numbers = [int(value) for value in sys.argv[1:]]
    sys.exit(asyncio.run(main(*(numbers + [20, 16][len(numbers) :]))))
