"""An engine process: how it is started, heard and ended, and how often it is restarted. Knows no requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.engine.wire import (
    DEVICE_LOST,
    HEADER,
    MAX_FRAME_BYTES,
    Close,
    EngineEvent,
    Heartbeat,
    Start,
    decode_event,
    encode,
)
from vllm_omni.envs import grow_segments, spin_briefly
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
_READ_BUFFER = 4 * 2**20
_END_S = 5.0  # an engine that was asked to end gets this long


@dataclass(frozen=True)
class Launch:
    """An engine process that has its `Start`, and this side of its socket pair. Needs no event loop yet."""

    start: Start
    process: subprocess.Popen[bytes]
    end: socket.socket
    began: float  # monotonic

    @classmethod
    def of(cls, start: Start) -> Launch:
        """Start the process; it answers `Loaded` or `StartFailed`, or ends. The calling thread must live on."""
        began, frame = time.monotonic(), encode(start)
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        paths = [_PACKAGE_PARENT, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        spin_briefly(environment)
        grow_segments(environment)
        if start.replicas > 1:  # else each takes all processors, and each waits for the others
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // start.replicas)))
        environment.setdefault("TQDM_DISABLE", "1")  # bars are no log lines
        if not start.log_prompts:  # their warnings repeat what they cut off a prompt
            environment |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vllm_omni.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        launch = cls(start, process, ours, began)
        try:
            ours.sendall(frame)
        except OSError:  # it has ended already
            launch.discard()
            raise
        return launch

    def discard(self) -> None:
        """End it, if it has not ended, and reap it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.end.close()


class EngineProcess:
    """A running engine process and this side of its socket pair."""

    def __init__(self, process: subprocess.Popen[bytes], reader: Any, writer: Any) -> None:
        self.process, self._reader, self._writer = process, reader, writer
        self.last_beat = time.monotonic()
        self.turn_s: float | None = None
        self._news = asyncio.Event()

    @classmethod
    async def adopt(cls, launch: Launch) -> EngineProcess:
        """Connect to a launched process; it is ended if this is cancelled."""
        with contextlib.ExitStack() as undo:
            undo.callback(launch.discard)
            launch.end.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=launch.end, limit=_READ_BUFFER)
            undo.pop_all()
        return cls(launch.process, reader, writer)

    def send(self, frame: bytes | bytearray) -> None:
        """Queue a frame; never waits. To an engine that died it goes nowhere."""
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> EngineEvent | None:
        """The next event other than a heartbeat; None once the process has closed its end."""
        while True:
            try:
                (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                if length > MAX_FRAME_BYTES:
                    raise ConnectionError(f"the engine sent a frame of {length} bytes")
                event = decode_event(await self._reader.readexactly(length))
            except (asyncio.IncompleteReadError, OSError, ValueError) as error:
                if not isinstance(error, asyncio.IncompleteReadError | ConnectionResetError):
                    logger.error("an event of the engine cannot be read: %s", error)
                return None
            self.last_beat = time.monotonic()
            if not isinstance(event, Heartbeat):
                return event
            self.turn_s = event.turn_s
            self._news.set()
            self._news.clear()

    async def answers(self, timeout_s: float) -> bool:
        """Whether it has sent anything in the last `timeout_s`, or does within that time."""
        if time.monotonic() - self.last_beat < timeout_s:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    def hangs(self, heartbeat_timeout_s: float, step_timeout_s: float) -> str | None:
        """The reason to take it for hung, or None."""
        silent = time.monotonic() - self.last_beat
        if silent > heartbeat_timeout_s:
            return f"it has been silent for {silent:.1f} s"
        if self.turn_s is not None and self.turn_s + silent > step_timeout_s:
            return f"its step has taken {self.turn_s + silent:.1f} s"
        return None

    async def end(self, kill: bool) -> str:
        """End the process, after asking it to unless `kill`, and reap it; returns how it ended."""
        if not kill:
            self.send(encode(Close()))
            await self._ended(_END_S)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self._ended(_END_S)
        self._writer.close()
        code = self.process.poll()
        if code is not None and code < 0:
            known = -code in set(signal.Signals)  # a real-time signal has no name
            return f"ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
        return "lost its device" if code == DEVICE_LOST else f"ended with exit code {code}"

    async def _ended(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.01)


class Restarts:
    """How often an engine may be restarted: `most` times in any `window_s`; at once if it served, else ever later."""

    def __init__(self, most: int, window_s: float) -> None:
        self.most, self.window_s = most, window_s
        self.count = 0
        self._times: deque[float] = deque()
        self._unserved = 0  # starts in a row that came to nothing

    def pause(self, now: float, served: bool) -> float | None:
        """Count one more; returns the seconds to wait first, or None for no more. `served`: the last one had loaded."""
        while self._times and self._times[0] < now - self.window_s:
            self._times.popleft()
        if len(self._times) >= self.most:
            return None
        self._times.append(now)
        self.count += 1
        self._unserved = 0 if served else self._unserved + 1
        return 0.0 if served else min(30.0, 0.5 * 2 ** (self._unserved - 1))
