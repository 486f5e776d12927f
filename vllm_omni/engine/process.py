"""The engine process: `python -m vllm_omni.engine.process FD`, started by `ProcessEngineClient` and by nobody else.

FD is one end of a socket pair that the front end made: no name, no file, nobody else can connect, and each side sees at
once that the other has ended, however it did. One thread reads, another writes, a third sends heartbeats, a
fourth fetches shared pictures; the main thread runs the steps.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_omni.engine.parent import end_with_parent
from vllm_omni.engine.pictures import fetch, places_in
from vllm_omni.engine.wire import (
    DEVICE_LOST,
    HEADER,
    MAX_FRAME_BYTES,
    Abort,
    Add,
    Close,
    Command,
    Control,
    EngineEvent,
    Heartbeat,
    Loaded,
    Outputs,
    Refused,
    Start,
    StartFailed,
    decode_command,
    encode,
    request_id_of,
)
from vllm_omni.errors import DeviceLostError, InvalidValueError, OmniError
from vllm_omni.logger import init_logger, log_as_json
from vllm_omni.outputs import OmniRequestOutput

logger = init_logger("vllm_omni.engine.process")  # `__name__` is "__main__" here

if TYPE_CHECKING:
    from vllm_omni.engine.loop import EngineLoop

MAX_BACKLOG = 256  # events not read yet; beyond, no progress is sent
FLUSH_S = 5.0
TURNS_PER_TIMEOUT = 3  # a forward that is expected to take longer is shared by fewer requests


class Link:
    """The engine's end of the socket: commands into a queue, events out of one. A wrong frame costs itself alone."""

    def __init__(self, end: socket.socket, lost: Callable[[], None]) -> None:
        """`lost` is called in a thread of the link when the other side is gone."""
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._end, self._lost = end, lost
        self._fetching: queue.SimpleQueue[Add] = queue.SimpleQueue()
        self._held: deque[tuple[Add, list[Command]]] = deque()  # being fetched, and what comes after each
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="vllm-omni-write", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="vllm-omni-read", daemon=True).start()
        threading.Thread(target=self._fetch, name="vllm-omni-fetch", daemon=True).start()

    def send(self, event: EngineEvent) -> None:
        """Encode and queue; never waits for the other side."""
        if self._events.qsize() > MAX_BACKLOG and isinstance(event, Outputs):
            event = Outputs([output for output in event.outputs if output.finished])
        try:
            self._events.put(encode(event))
        except InvalidValueError as error:  # e.g. a result too long to send: its request alone fails
            if not isinstance(event, Outputs):
                raise
            for output in event.outputs:
                failed = OmniRequestOutput(output.request_id, error=OmniError(f"the result could not be sent: {error}"))
                self.send(Outputs([output if len(event.outputs) > 1 else failed]))

    def close(self) -> None:
        """Send what waits, if the other side reads it."""
        self._events.put(None)
        self._writer.join(FLUSH_S)

    def _write(self) -> None:
        try:
            while (frame := self._events.get()) is not None:
                self._end.sendall(frame)
        except OSError:
            self._lost()

    def _read(self) -> None:
        try:
            self._take_frames()
        finally:  # also by an error, such as no memory for a frame
            self.commands.put(Close())
            self._lost()

    def _take_frames(self) -> None:
        while (header := self._exactly(HEADER.size)) is not None:
            (length,) = HEADER.unpack(header)
            if length > MAX_FRAME_BYTES:
                logger.error("a frame of %d bytes is dropped, at most %d are taken", length, MAX_FRAME_BYTES)
                if not self._skip(length):
                    return
                continue
            if (body := self._exactly(length)) is None:
                return
            try:
                self._take(decode_command(body))
            except (ValueError, MemoryError) as error:
                logger.error("a frame of %d bytes is dropped: %s", length, error)
                if request_id := request_id_of(body):  # somebody waits for it
                    wrong = InvalidValueError("request", f"{length} bytes", "could not be read by the engine")
                    self._refuse(request_id, wrong if isinstance(error, ValueError) else _no_room(error))

    def _refuse(self, request_id: str, error: OmniError) -> None:
        self.send(Refused(request_id, error))

    def _take(self, command: Command) -> None:
        """Queue a command; one with pictures in shared memory comes when they are here, and what is about it then."""
        with self._lock:
            if isinstance(command, Add):
                if places_in(command.prompt):
                    self._held.append((command, []))
                    return self._fetching.put(command)
                if (after := self._after(command.request_id)) is not None:  # its id is used again
                    return after.append(command)
            if isinstance(command, Abort):
                for request_id in command.request_ids:
                    if (after := self._after(request_id)) is not None:
                        after.append(Abort([request_id]))
            if isinstance(command, Control) and self._held:  # an adapter goes after the requests that have it
                return self._held[-1][1].append(command)
            self.commands.put(command)

    def _after(self, request_id: str) -> list[Command] | None:
        """What comes after the last request of this id whose pictures are fetched; None if there is none."""
        return next((after for add, after in reversed(self._held) if add.request_id == request_id), None)

    def _fetch(self) -> None:
        """In a thread of its own: neither a step nor another command waits for large pictures."""
        try:
            while True:
                add, refused = self._fetching.get(), False
                after = self._held[0][1]
                try:
                    if not any(isinstance(one, Abort) and add.request_id in one.request_ids for one in after):
                        fetch(add.prompt, add.params)
                except (OSError, RuntimeError, TypeError, ValueError, MemoryError) as error:  # its own trouble
                    logger.error("the pictures of a request are dropped: %s", error)
                    self._refuse(add.request_id, _no_room(error))
                    refused = True
                with self._lock:
                    self._held.popleft()
                    for command in [*([] if refused else [add]), *after]:
                        self.commands.put(command)
                del add, after
        finally:  # by an error of ours
            self._lost()

    def _exactly(self, length: int) -> bytearray | None:
        body = bytearray(length)
        view, filled = memoryview(body), 0
        while filled < length:
            try:
                count = self._end.recv_into(view[filled:])
            except OSError:
                return None
            if count == 0:
                return None
            filled += count
        return body

    def _skip(self, length: int) -> bool:
        while length > 0:
            if (part := self._exactly(min(length, 2**20))) is None:
                return False
            length -= len(part)
        return True


def _no_room(error: Exception) -> OmniError:
    """The engine's own trouble: the request may be asked again."""
    return OmniError(f"the engine could not take in the request ({type(error).__name__}); ask again")


def beat(link: Link, every_s: float, turn_began: Callable[[], float | None], parent: int) -> None:
    """Send heartbeats, with the time that the loop has spent in its present turn; end with the parent."""
    while True:
        time.sleep(every_s)
        if os.getppid() != parent:
            os._exit(1)
        began = turn_began()
        link.send(Heartbeat(None if began is None else max(0.0, time.monotonic() - began)))


def _load(start: Start, link: Link) -> tuple[EngineLoop, Loaded]:
    """The loop, ready to serve; OmniError if the model is wrong, if possible before anything heavy is imported."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.model_folder import resolve_model

    config = OmniDiffusionConfig(**start.engine_args)
    resolve_model(config.model)
    gc.disable()  # what is imported and loaded stays: looking through it again and again is a seventh of the start

    from vllm_omni.kernels.placement import device_in_turn, see_in_turn

    ranks = config.parallel_config.ranks
    if start.replicas > 1 and ranks > 1:  # before anything asks CUDA for its devices, as an import may
        see_in_turn(config.device, start.replica, start.replicas, ranks)

    from vllm_omni.distributed.lockstep import open_engine
    from vllm_omni.engine.describe import describe
    from vllm_omni.engine.learning import IdleLearning
    from vllm_omni.engine.loop import EngineLoop, warm_up
    from vllm_omni.engine.malloc import keep_freed_memory
    from vllm_omni.engine.waiting import wait_politely

    keeps_memory = keep_freed_memory(config.device)
    wait_politely()
    if start.replicas > 1 and ranks == 1:
        names = "device", *config.component_devices
        config = config.model_copy(update={name: device_in_turn(vars(config)[name], start.replica) for name in names})
    engine = open_engine(config, lambda: os._exit(DEVICE_LOST))
    if start.step_timeout_s is not None and ranks == 1:
        engine.worker.runner.room.longest_s = start.step_timeout_s / TURNS_PER_TIMEOUT
    loop = EngineLoop(engine, link.commands, link.send, log_prompts=start.log_prompts)
    loop.costs, loop.keeps_memory = start.costs or loop.costs, keeps_memory
    info = describe(engine, {})
    tokens = warm_up(engine, info, loop.costs) if start.warmup else {}
    if ranks == 1:  # trials follow the clock, which is not the same on all ranks
        loop.learning = IdleLearning(engine, info)
    if start.condition is not None:
        loop.control.restore(start.condition)
    if loop.learning is not None and not start.trials:
        loop.learning.end("the process before this one ended while it had no request")
    gc.freeze()
    gc.enable()
    return loop, Loaded(describe(engine, tokens), loop.control.condition)


def main() -> int:
    """Load, report it, and serve until Close or until the front end is gone."""
    parent = os.getppid()
    end_with_parent()
    # a terminal or a service manager signals all; the front end decides
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(sys.argv[1])), lambda: os._exit(1))
    start = link.commands.get()
    if not isinstance(start, Start):
        return 2
    if start.log_json:
        log_as_json()
    loop: EngineLoop | None = None
    arguments = link, start.heartbeat_s, lambda: loop.turn_began if loop is not None else None, parent
    threading.Thread(target=beat, args=arguments, name="vllm-omni-beat", daemon=True).start()

    try:
        loop, loaded = _load(start, link)
    except OmniError as error:  # the front end shows it
        link.send(StartFailed(error))
        link.close()
        return 1
    link.send(loaded)
    try:
        loop.run()
    except DeviceLostError as error:  # another process can use the device again; whoever waits hears of this one's end
        logger.critical("the engine ends: %s", error)
        link.close()
        return DEVICE_LOST
    link.close()
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    finally:
        if (error := sys.exception()) is not None:
            logger.critical("the engine failed", exc_info=error)
        sys.stdout.flush()
        os._exit(code)  # nothing is left to tidy, and library threads must not delay the end
