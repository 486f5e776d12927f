"""A rank other than 0: `python -m vllm_omni.distributed.rank FD`, started by its group and by nobody else.

The main thread does what rank 0 says; one thread reads, another sends heartbeats. When rank 0 is gone, so is this.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from functools import partial
from typing import Any

from vllm_omni.distributed.messages import Beat, Done, Failed, Join, Loaded, Meet, Turn, Verdict, receive, send
from vllm_omni.engine.parent import end_with_parent
from vllm_omni.engine.wire import Abort, Add, Close
from vllm_omni.errors import OmniError
from vllm_omni.logger import init_logger, log_as_json

logger = init_logger("vllm_omni.distributed.rank")

DIFFERS = 4  # the exit code of a rank that would have run something else


class Rank:
    """This process as rank 0 sees it."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._lock = end, threading.Lock()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, message: Any) -> None:
        with self._lock:
            send(self._end, message)

    def next(self) -> Any:
        return self._messages.get()

    def beat(self, every_s: float) -> None:
        """In a thread, until the process ends."""
        while True:
            self.tell(Beat())
            time.sleep(every_s)

    def fails_alike(self, timeout_s: float, error: Exception) -> bool:
        """Report a failure, and wait for what rank 0 makes of it, which may wait for slower ranks."""
        from vllm_omni.distributed.group import GRACE_S
        from vllm_omni.distributed.lockstep import told

        self.tell(Failed(told(error)))
        try:
            self._verdicts.get(timeout=2 * (timeout_s + GRACE_S))
        except queue.Empty:
            return False
        return True

    def follow(self, engine: Any) -> int:
        """Do every turn; returns the exit code."""
        from vllm_omni.distributed.lockstep import asked, digest_of
        from vllm_omni.engine.control import EngineControl

        control = EngineControl(engine)
        while not isinstance(turn := self.next(), Close):
            assert isinstance(turn, Turn)
            for act in turn.acts:
                if isinstance(act, Add):
                    engine.add_request(asked(act), act.priority, act.arrived)
                elif isinstance(act, Abort):
                    engine.abort(act.request_ids)
                else:
                    control.do(act.action)
            engine.scheduler.held = turn.held
            engine.worker.runner.pace.learn(turn.paced)
            if (digest := digest_of(engine)) != turn.digest:
                logger.critical("turn %d: this rank would run %s, rank 0 runs %s", turn.number, digest, turn.digest)
                return DIFFERS
            engine.step()
            control.after_step()
            self.tell(Done(turn.number))
        return 0

    def _read(self) -> None:
        try:
            while (message := receive(self._end, to_rank=True)) is not None:
                (self._verdicts if isinstance(message, Verdict) else self._messages).put(message)
        finally:  # rank 0 is gone, and may never come to a collective that the main thread waits in
            os._exit(1)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # rank 0 decides
        signal.signal(number, signal.SIG_IGN)
    rank = Rank(socket.socket(fileno=int(sys.argv[1])))
    join = rank.next()
    assert isinstance(join, Join)
    if join.bound:
        end_with_parent()
    if join.log_json:
        log_as_json()
    from vllm_omni.distributed.group import BEAT_S

    threading.Thread(target=rank.beat, args=(BEAT_S,), daemon=True).start()
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
    from vllm_omni.distributed.setup import config_of, join_group
    from vllm_omni.engine.waiting import wait_politely

    wait_politely()
    try:
        engine = DiffusionEngine(config_of(OmniDiffusionConfig(**join.engine_args), join.rank))
    except OmniError as error:
        rank.tell(Loaded(error))
        return 1
    rank.tell(Loaded())
    if not isinstance(meet := rank.next(), Meet):
        return 0
    for name, found in meet.found.items():
        engine.worker.runner.denoisers[name].believe(found)
    alike = partial(rank.fails_alike, engine.config.parallel_config.rank_timeout_s)
    join_group(engine, join.rank, join.rendezvous, join.seed, alike)
    return rank.follow(engine)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    finally:
        if (error := sys.exception()) is not None:
            logger.critical("the rank failed", exc_info=error)
        sys.stdout.flush()
        os._exit(code)
