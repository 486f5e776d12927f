"""Runs requests against a target in threads: a closed loop of clients, or an open loop of arrivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, LifoQueue, SimpleQueue
from threading import BoundedSemaphore, Thread
from typing import Any

from vllm_omni.bench.client import Client, Outcome, Target
from vllm_omni.bench.stats import Sample

MOST_AT_ONCE = 1024  # connections of an open loop; a request due while all are busy waits, and its wait counts
Body = dict[str, Any]
Done = Callable[[Sample], None]


def closed(target: Target, bodies: Iterable[Body], clients: int, done: Done = lambda _: None) -> list[Sample]:
    """`clients` at once, each asking again as soon as it has its reply, until all requests are answered."""
    waiting: SimpleQueue[Body] = SimpleQueue()
    for body in bodies:
        waiting.put(body)
    samples: list[Sample] = []
    began = time.perf_counter()

    def work() -> None:
        client = Client(target)
        while True:
            try:
                body = waiting.get_nowait()
            except Empty:
                return client.close()
            due = time.perf_counter() - began
            _note(samples, client, body, due, began, done)

    threads = [_started(work) for _ in range(clients)]
    try:
        for thread in threads:
            thread.join()
    finally:  # after Ctrl-C, what is under way is left to itself, and nothing follows it
        with suppress(Empty):
            while True:
                waiting.get_nowait()
    return samples


def open_loop(
    target: Target, bodies: Sequence[Body], times: Sequence[float], done: Done = lambda _: None
) -> list[Sample]:
    """Each request at its time, whether or not others are answered."""
    idle: LifoQueue[Client] = LifoQueue()
    free = BoundedSemaphore(MOST_AT_ONCE)
    samples: list[Sample] = []
    began = time.perf_counter()

    def work(body: Body, due: float) -> None:
        try:
            client = idle.get_nowait()
        except Empty:
            client = Client(target)
        try:
            _note(samples, client, body, due, began, done)
            idle.put(client)
        finally:
            free.release()

    threads = []
    for body, due in zip(bodies, times, strict=True):
        time.sleep(max(0.0, due - (time.perf_counter() - began)))
        free.acquire()
        threads.append(_started(work, body, due))
    for thread in threads:
        thread.join()
    while not idle.empty():
        idle.get_nowait().close()
    return samples


def _started(work: Callable[..., None], *given: Any) -> Thread:
    """A thread that nobody has to wait for: a request may take minutes."""
    thread = Thread(target=work, args=given, daemon=True)
    thread.start()
    return thread


def _note(samples: list[Sample], client: Client, body: Body, due: float, began: float, done: Done) -> None:
    try:
        outcome = client.ask(body)
    except Exception as error:  # a reply of another kind than was asked for
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    sample = Sample(due, time.perf_counter() - began, outcome.pictures, outcome.error)
    samples.append(sample)
    done(sample)
