"""A group as its rank 0 has it: the processes of the other ranks, what is heard of them, and their end.

A rank that ends, is silent, differs or fails alone ends the group: all ranks are killed, and whoever waits for one of
them in a collective fails with it.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_omni.distributed.messages import (
    Beat,
    Done,
    Failed,
    Join,
    Loaded,
    Meet,
    ToRank,
    Verdict,
    receive,
    send,
)
from vllm_omni.engine.wire import Close
from vllm_omni.envs import grow_segments, spin_briefly
from vllm_omni.errors import DeviceLostError, OmniError
from vllm_omni.logger import init_logger, logs_json

logger = init_logger(__name__)

LEAD = 8  # turns that rank 0 may be ahead of the slowest rank
GRACE_S = 2.0  # between the first rank's failure and the last one's, if all fail alike, beside the forward's time
SILENT_S = 15.0  # a process that lives sends a beat every `BEAT_S`
BEAT_S = 0.5
LOAD_S = 600.0
_END_S = 5.0
_PARENT = str(Path(__file__).resolve().parent.parent.parent)


class Member:
    """Another rank's process, and what it has said."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], end: socket.socket) -> None:
        self.rank, self.process, self.end = rank, process, end
        self.heard = time.monotonic()
        self.loaded: Loaded | None = None
        self.done = 0
        self.failed: str | None = None
        self.failed_at = 0.0


class Group:
    """All other ranks. `lost` is called once, in a thread of the group, when it has come to an end by itself."""

    def __init__(self, size: int, timeout_s: float, lost: Callable[[], None] | None = None) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._lost, self._news = lost, threading.Condition()
        self._why: str | None = None
        self._closed = False
        self._turn, self._began = 0, time.monotonic()  # what rank 0 does, and since when
        self._judging = False  # whether all ranks have failed alike
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-omni-ranks-")
        self.rendezvous = str(Path(self._folder.name) / "rendezvous")
        self.members: list[Member] = []

    def start(self, engine_args: dict[str, Any], seed: int) -> None:
        """Start the processes; they load the model while rank 0 does."""
        bound = threading.current_thread() is threading.main_thread()
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            environment = dict(os.environ)
            paths = [_PARENT, environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            spin_briefly(environment)
            grow_segments(environment)
            environment.setdefault("TQDM_DISABLE", "1")
            command = [sys.executable, "-P", "-m", "vllm_omni.distributed.rank", str(theirs.fileno())]
            try:
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env=environment,
                )
            except OSError as error:
                ours.close()
                self.close()
                raise OmniError(f"rank {rank} could not be started: {error.strerror}") from None
            finally:
                theirs.close()
            member = Member(rank, process, ours)
            self.members.append(member)
            threading.Thread(target=self._hear, args=(member,), name=f"vllm-omni-rank-{rank}", daemon=True).start()
            send(ours, Join(engine_args, rank, self.rendezvous, seed, logs_json(), bound))
        threading.Thread(target=self._watch, name="vllm-omni-ranks", daemon=True).start()

    def meet(self, found: dict[str, str]) -> None:
        """Return once all have loaded the model; raises the reason of one that has not.

        `found`: what rank 0 knows of its denoisers; the others will know the same.
        """
        self._wait(lambda: all(member.loaded is not None for member in self.members), LOAD_S, "load its model")
        for member in self.members:
            if member.loaded is not None and member.loaded.error is not None:
                raise member.loaded.error
        self.tell(Meet(found))

    def tell(self, message: ToRank) -> None:
        """Send to every rank; DeviceLostError if one is gone."""
        self.check()
        try:
            for member in self.members:
                send(member.end, message)
        except OSError:
            self._end(f"rank {member.rank} does not read any more")
            self.check()

    def check(self) -> None:
        """DeviceLostError if the group has come to its end."""
        if self._why is not None:
            raise DeviceLostError(f"the group of ranks has ended: {self._why}")

    def keep_up(self, number: int) -> None:
        """Wait for ranks that are too far behind turn `number`, which begins then."""
        self._turn, self._began = number, math.inf
        self._wait(lambda: all(m.done >= number - LEAD for m in self.members), self.timeout_s, f"reach turn {number}")
        self._began = time.monotonic()

    def fails_alike(self, what: str) -> bool:
        """Whether every other rank reports the same failure of the same forward, too.

        Forwards without a collective may be turns apart: a rank is given the time to get there, and to do this one.
        """
        took = time.monotonic() - self._began
        grace = GRACE_S + (took if took < self.timeout_s else 0.0)  # after so long this one has waited for the others
        with self._news:
            self._judging = True
            self._news.wait_for(lambda: self._why or all(map(self._is_there, self.members)), self.timeout_s)
            self._news.wait_for(lambda: self._why or all(m.failed is not None for m in self.members), grace)
            told = [member.failed for member in self.members]
            for member in self.members:
                member.failed = None
            self._judging = False
        alike = self._why is None and all(other == what for other in told)
        if not alike:
            self._end(f"a forward has failed on some ranks only: {what}; {', '.join(map(str, told))}")
            return False
        self.tell(Verdict())
        return True

    def _is_there(self, member: Member) -> bool:
        """Whether a rank has failed, or has begun what rank 0 does."""
        return member.failed is not None or member.done >= self._turn - 1

    def close(self) -> None:
        """End the other ranks, and reap them."""
        self._closed = True
        for member in self.members:
            try:
                send(member.end, Close())
            except OSError:
                continue
        until = time.monotonic() + _END_S
        while any(m.process.poll() is None for m in self.members) and time.monotonic() < until and not self._why:
            time.sleep(0.01)
        for member in self.members:
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait()
            member.end.close()
        self._folder.cleanup()

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self._news:
            self._news.wait_for(lambda: self._why or done(), timeout_s)
        if self._why is None and not done():
            self._end(f"a rank did not {what} within {timeout_s:.0f} s")
        self.check()

    def _end(self, why: str) -> None:
        """Note the end, kill the ranks, and say so: nobody may wait for a collective that will not come."""
        with self._news:
            if self._why is not None or self._closed:
                return
            self._why = why
            self._news.notify_all()
        logger.critical("the group of %d ranks ends: %s", self.size, why)
        for member in self.members:
            if member.process.poll() is None:
                member.process.kill()
        if self._lost is not None:
            threading.Timer(GRACE_S, self._lost).start()  # the main thread may end things by itself

    def _hear(self, member: Member) -> None:
        """In a thread per rank: take in what it says."""
        try:
            while (message := receive(member.end, to_rank=False)) is not None:
                member.heard = time.monotonic()
                if isinstance(message, Beat):
                    continue
                with self._news:
                    if isinstance(message, Loaded):
                        member.loaded = message
                    elif isinstance(message, Done):
                        member.done = message.number
                    elif isinstance(message, Failed):
                        member.failed, member.failed_at = message.what, time.monotonic()
                    self._news.notify_all()
        except (OSError, ValueError) as error:
            logger.error("rank %d cannot be understood: %s", member.rank, error)
        if member.loaded is None or member.loaded.error is None:
            time.sleep(0.05)  # its exit code comes after the end of its socket
            code = member.process.poll()
            self._end(f"rank {member.rank} has ended" + ("" if code is None else f" (exit code {code})"))

    def _watch(self) -> None:
        """In a thread: end the group when a process has been silent for too long."""
        while self._why is None and not self._closed:
            before = time.monotonic()
            time.sleep(BEAT_S / 2)
            if time.monotonic() - before > 4 * BEAT_S:
                continue  # this process stood still itself
            for member in self.members:
                patience = min(SILENT_S, self.timeout_s) * (1 if member.loaded else 20)
                if time.monotonic() - member.heard > patience:
                    self._end(f"rank {member.rank} has been silent for {patience:.0f} s")
                if self._fails_alone(member):
                    self._end(f"rank {member.rank} has failed alone: {member.failed}")

    def _fails_alone(self, member: Member) -> bool:
        """Whether rank 0 should have failed as well by now: in twice the time that the member had, or less."""
        with self._news:
            if member.failed is None or self._judging:
                return False
            took = min(max(0.0, member.failed_at - self._began), self.timeout_s)
            return time.monotonic() - max(member.failed_at, self._began) > 2 * GRACE_S + took
