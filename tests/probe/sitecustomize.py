"""In every Python process that has this folder on its PYTHONPATH: what a test from outside cannot see or time.

The variables that tests set, each without effect where it is not there; the engine process is the one of
`vllm_omni.engine.process`, the front end the one of `vllm serve`:

- OMNI_PROBE_TRACE: a UNIX datagram socket, told of every part of the engine's work as `TIME WHAT REQUEST ...`
- OMNI_PROBE_SLOW: `encode,step,decode`: so many seconds are slept before each of them, so that they can be met
- OMNI_PROBE_CACHE: a file; with every report of the engine a line `GAUGE LIVE`: bytes as counted, bytes of the tensors
- OMNI_PROBE_MEMRAY: a prefix; SIGUSR1 begins a memray file `PREFIX.ROLE.NUMBER`, SIGUSR2 ends it
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from typing import Any

ENGINE = "vllm_omni.engine.process" in sys.orig_argv
FRONT_END = sys.orig_argv[1:2] != ["-c"] and "serve" in sys.orig_argv and not ENGINE


def around(owner: Any, name: str, before: Any) -> None:
    """Let `before` see the arguments of every call of a method."""
    original = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return original(*args, **kwargs)

    setattr(owner, name, method)


def trace(path: str) -> None:
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
    from vllm_omni.diffusion.worker.runner import ModelRunner
    from vllm_omni.diffusion.worker.worker import DiffusionWorker

    out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    encode_s, step_s, decode_s = (float(value) for value in os.environ.get("OMNI_PROBE_SLOW", "0,0,0").split(","))

    def tell(what: str, ids: list[str], sleep_s: float) -> None:
        out.sendto(" ".join([str(time.monotonic()), what, *ids]).encode(), path)
        time.sleep(sleep_s)

    def loaded(worker: Any) -> None:
        around(worker.pipeline.vae, "decode", lambda *args: tell("decode", [], decode_s))

    load = DiffusionWorker.load_model

    def load_model(worker: Any, *args: Any) -> None:
        load(worker, *args)
        loaded(worker)

    DiffusionWorker.load_model = load_model  # type: ignore[method-assign]
    around(DiffusionEngine, "_start", lambda engine, entry: tell("encode", [entry.request.request_id], encode_s))

    def run(runner: Any, batch: Any) -> None:
        if batch[0].parked.rows and batch[0].parked.signal is None:  # no text encoder, no decoder, no look of a gate
            tell("step", [request.request_id for request in batch], step_s)

    around(ModelRunner, "run", run)


def count_cache(path: str) -> None:
    from vllm_omni.diffusion.cache.store import Buffer
    from vllm_omni.engine.loop import EngineLoop
    from vllm_omni.nested import tensors_in

    file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the process

    def count(loop: Any) -> None:
        buffers = [thing for thing in gc.get_objects() if type(thing) is Buffer]
        kept = [
            getattr(one, "value", one) for buffer in buffers for one in buffer._tensors.values()
        ]  # or whole outputs
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(kept)}
        file.write(f"{loop.engine.worker.cache_bytes} {sum(storages.values())}\n")

    around(EngineLoop, "_report", count)


def record_memory(prefix: str) -> None:
    import memray

    trackers: list[Any] = []

    def begin(*_: Any) -> None:
        gc.collect()
        name = f"{prefix}.{'engine' if ENGINE else 'front_end'}.{len(trackers)}"
        trackers.append(memray.Tracker(name, trace_python_allocators=True))
        trackers[-1].__enter__()

    def end(*_: Any) -> None:
        gc.collect()  # else what only a collection frees would count
        sys._clear_type_cache()  # and names that CPython's cache of attribute look-ups holds, some thousands at most
        trackers[-1].__exit__(None, None, None)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)


if ENGINE and "OMNI_PROBE_TRACE" in os.environ:
    trace(os.environ["OMNI_PROBE_TRACE"])
if ENGINE and "OMNI_PROBE_CACHE" in os.environ:
    count_cache(os.environ["OMNI_PROBE_CACHE"])
if (ENGINE or FRONT_END) and "OMNI_PROBE_MEMRAY" in os.environ:
    record_memory(os.environ["OMNI_PROBE_MEMRAY"])
