"""Mixed requests on one process or on several ranks: `python ranks_matrix.py FAMILY 'ENGINE ARGS' 'MORE'`.

Prints one JSON line per cache: every latent and count, and the bytes that were kept at most. Both arguments are JSON
objects; MORE has the names of the `caches`, if not all, how many tokens prompt and negative prompt have (`lengths`),
and height and width (`size`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
MASK = [1, 1, 1, 0, 1, 0, 1, 0]
CACHES: dict[str, Any] = {
    "off": "off",
    "plan": {"backend": "magcache", "steps_mask": MASK},
    "outer gate": {"backend": "seacache", "rel_l1_thresh": 0.3},
    "inner gate": {"backend": "fbcache", "rel_l1_thresh": 0.6},
}
WHOLE = "whole outputs"  # forecasts of what the denoiser returns; asked for by name


def requests_of(family: Any, cache: Any, more: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Four: of other steps, other guidance, one without any."""
    from family import of_length

    from vllm_omni import OmniDiffusionSamplingParams as Params

    asked, lengths = {}, more.get("lengths", (8, 8))
    settings = family.settings | dict(zip(("height", "width"), more.get("size", ()), strict=False))
    for i, (steps, scale) in enumerate(((8, 3.0), (6, 4.0), (8, 1.0), (9, 2.0))):
        params = Params(
            num_inference_steps=steps, seed=None if i == 3 else i, output_type="latent", cache=cache,
            **settings, **family.guided(scale),
        )  # fmt: skip
        number = (0, 1, 3, 4)[i]  # number 2 has a mask, which a ring cannot have
        asked[str(i)] = of_length(family, number, *lengths), params
    return asked


def whole_outputs(omni: Any) -> dict[str, Any]:
    """A cache with the plan's mask, and a profile by which outputs are forecast."""
    from vllm_omni.diffusion.cache.profile import CacheProfile

    steps = len(MASK)
    near = tuple(tuple(0.9 ** abs(i - j) for j in range(steps)) for i in range(steps))
    kind = type(omni.engine.worker.pipeline.transformer).__name__
    facts = {"gram": near, "output_gram": near, "ratios": (1.0,) * steps}
    profile = CacheProfile(
        name="whole", transformer_class=kind, sigmas=tuple(1 - i / steps for i in range(steps)), **facts
    )
    path = Path(tempfile.mkdtemp()) / "whole.json"
    profile.save(path)
    return {"backend": "magcache", "steps_mask": MASK, "profile": str(path)}


def serve(omni: Any, family: Any, name: str, more: dict[str, Any]) -> dict[str, Any]:
    from serving import made
    from stepping import add

    engine, worker = omni.engine, omni.engine.worker
    before = dict(worker.runner.forwards)
    asked = requests_of(family, CACHES[name], more)
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
    more = json.loads(sys.argv[3])
    with Omni("demo", dtype="float32", device="cpu", **json.loads(sys.argv[2])) as omni:
        CACHES.update({WHOLE: whole_outputs(omni)} if WHOLE in more.get("caches", ()) else {})
        for name in more.get("caches", CACHES):
            print(json.dumps(serve(omni, family, name, more)), flush=True)
    print(json.dumps({"seconds": time.monotonic() - BEGAN}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
