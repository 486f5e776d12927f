"""Which lines of the package hold more memory after many requests, half of them aborted: none should.

`python tests/stress/engine_sites.py [requests=2000]`; the last line is JSON, exit code 0 if all holds. The engine
without its process, so that allocations can be traced, each to the innermost line of the package that led to it.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import engine_common as common

import vllm_omni
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams as Params
from vllm_omni.inputs.data import normalise_prompt

PACKAGE = str(Path(vllm_omni.__file__).parent)
FRAMES = 12
MOST_BYTES = 16 * 1024  # of one line; tables of bounded size fill up


def work(engine: DiffusionEngine, dice: random.Random, requests: int) -> Counter[str]:
    """Waves of a full batch; half of each is aborted after a few steps, the rest runs to its end."""
    ends: Counter[str] = Counter()
    for wave in range(0, requests, 16):
        names = [f"site-{dice.random()}-{wave + i}" for i in range(16)]
        for name in names:
            params = {"height": 32, "width": 32, "num_inference_steps": dice.choice((4, 6)), "seed": wave}
            given = Params(**params, cache=dice.choice(common.CACHES[:4]))
            engine.add_request(OmniDiffusionRequest(name, "sun", normalise_prompt("sun"), given))
        for _ in range(dice.randint(0, 2)):
            ends.update("failed" if output.error else "ok" for output in engine.step())
        engine.abort(dice.sample(names, 8))
        while engine.has_unfinished_requests():
            ends.update("aborted" if output.error else "ok" for output in engine.step())
    return ends


def by_line(snapshot: tracemalloc.Snapshot) -> Counter[str]:
    held: Counter[str] = Counter()
    for trace in snapshot.traces:
        ours = [frame for frame in trace.traceback if frame.filename.startswith(PACKAGE)]
        if ours:
            held[f"{ours[-1].filename.removeprefix(PACKAGE)}:{ours[-1].lineno}"] += trace.size
    return held


def main(requests: int) -> int:
    engine, dice = DiffusionEngine(OmniDiffusionConfig(**common.ARGS)), random.Random(9)
    work(engine, dice, 160)
    gc.collect()
    tracemalloc.start(FRAMES)
    work(engine, dice, 160)
    gc.collect()
    before = by_line(tracemalloc.take_snapshot())
    ends = work(engine, dice, requests)
    gc.collect()
    grown = by_line(tracemalloc.take_snapshot())
    tracemalloc.stop()
    grown.subtract(before)
    cache_bytes = engine.worker.cache_bytes
    engine.close()
    most = {line: size for line, size in grown.most_common(5) if size > 0}
    good = max(most.values(), default=0) < MOST_BYTES and not cache_bytes and not ends["failed"]
    print(json.dumps({"ends": dict(ends), "grown_bytes": most, "cache_bytes": cache_bytes, "ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or ["2000"])[0])))
