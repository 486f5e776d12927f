"""Mixed requests on one process or on several ranks: `python ranks_matrix.py FAMILY 'ENGINE ARGS AS JSON'`.

Prints one JSON line per cache: every latent and count, and the bytes that were kept at most.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

BEGAN = time.monotonic()
MASK = [1, 1, 1, 0, 1, 0, 1, 0]
CACHES: dict[str, Any] = {
    "off": "off",
    "plan": {"backend": "magcache", "steps_mask": MASK},
    "outer gate": {"backend": "seacache", "rel_l1_thresh": 0.3},
    "inner gate": {"backend": "fbcache", "rel_l1_thresh": 0.6},
}


def requests_of(family: Any, cache: Any) -> dict[str, tuple[Any, Any]]:
    """Four: of other steps, other guidance, one without any."""
    from vllm_omni import OmniDiffusionSamplingParams as Params

    asked = {}
    for i, (steps, scale) in enumerate(((8, 3.0), (6, 4.0), (8, 1.0), (9, 2.0))):
        params = Params(
            num_inference_steps=steps, seed=None if i == 3 else i, output_type="latent", cache=cache,
            **family.settings, **family.guided(scale),
        )  # fmt: skip
        asked[str(i)] = (family.prompt((0, 1, 3, 4)[i]), params)  # number 2 has a mask, which a ring cannot have
    return asked


def serve(omni: Any, family: Any, name: str, cache: Any) -> dict[str, Any]:
    from serving import made
    from stepping import add

    engine, worker = omni.engine, omni.engine.worker
    before = dict(worker.runner.forwards)
    asked = requests_of(family, cache)
    peak, steps, ended = 0, 0, {}
    for request_id, (prompt, params) in list(asked.items())[:2]:
        add(omni, name + request_id, prompt, params)
    while engine.has_unfinished_requests():
        if steps == 3:
            for request_id, (prompt, params) in list(asked.items())[2:]:
                add(omni, name + request_id, prompt, params)
        if steps == 8:
            engine.abort([name + "3"])
        ended |= {output.request_id.removeprefix(name): output for output in engine.step()}
        steps += 1
        if steps > 6:  # by then every step has been seen as a whole
            peak = max(peak, worker.cache_bytes)
    results = {i: made(output).tolist() for i, output in sorted(ended.items()) if output.error is None}
    return {
        "cache": name,
        "latents": results,
        "counts": {i: (output.computed_steps, output.skipped_steps) for i, output in sorted(ended.items())},
        "errors": {i: type(output.error).__name__ for i, output in sorted(ended.items()) if output.error},
        "forwards": {kind: count - before[kind] for kind, count in worker.runner.forwards.items()},
        "peak": peak,
        "left": worker.cache_bytes,
        "steps": steps,
        "turns": vars(engine).get("turns"),
        "ranks": engine.config.parallel_config.ranks,
    }


def main() -> None:
    from families import FAMILIES

    from vllm_omni import Omni

    family = next(family for family in FAMILIES if family.name == sys.argv[1])
    with Omni("demo", dtype="float32", device="cpu", **json.loads(sys.argv[2])) as omni:
        for name, cache in CACHES.items():
            print(json.dumps(serve(omni, family, name, cache)), flush=True)
    print(json.dumps({"seconds": time.monotonic() - BEGAN}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
