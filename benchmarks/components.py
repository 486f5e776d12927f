"""What text encoders and decoder in threads of their own give and cost: closed loop, the demo model, mixed step counts.

The same requests through an engine that encodes and decodes between two forwards and one that does it beside them
(`--vae-device`, `--text-encoder-device`), here on one device. `--threads` is what each thread of either may use. Prints
the throughput of the second over the first, and the longest pause between two of its forwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from common import DEVICE, arguments, begin, interleaved, last_line, paired_ratio, table

PROMPTS = ("red apple", "penguin", "blue car", "pizza", "snowman", "green tree", "yellow star", "house")
STEPS = (20, 28, 28, 50)
CACHES = {"off": "off", "cached": {"speedup": 3.0}}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--running", type=int, default=8, help="requests in the batch")
    options = parser.parse_args()
    machine = begin(options)
    from vllm_omni import Omni

    ways: dict[str, dict[str, str]] = {
        "in line": {},
        "beside": {"vae_device": str(DEVICE), "text_encoder_device": str(DEVICE)},
    }
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        engine: dict[str, Any] = {"cache_backend": "magcache", "max_num_seqs": options.running, "prompt_cache_mb": 0}
        engines = {way: stack.enter_context(Omni("demo", **engine, **more)) for way, more in ways.items()}
        for name, cache in CACHES.items():
            figures[name] = measure(options, engines, cache)
    headers = ["", "throughput beside, of that in line", "longest pause in line, ms", "beside, ms", "worst picture"]
    rows = [[k, f["ratio"], f["pause_ms"]["in line"], f["pause_ms"]["beside"], f["levels"]] for k, f in figures.items()]
    table(headers, rows)
    last_line({"benchmark": "components", **machine, "requests": options.requests, "cases": figures})


def measure(options: Any, engines: dict[str, Any], cache: Any) -> dict[str, Any]:
    """Ratio of throughputs, median of each one's longest pause between two forwards, and the worst picture's levels."""
    from vllm_omni import OmniDiffusionSamplingParams as Params

    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.requests)]
    params = [Params(num_inference_steps=STEPS[i % len(STEPS)], seed=i, cache=cache) for i in range(options.requests)]
    made: dict[str, list[Any]] = {}
    pauses: dict[str, list[float]] = {way: [] for way in engines}

    def run(way: str) -> None:
        omni, ends, longest = engines[way], [0.0], [0.0]

        def begins(*_: Any) -> None:
            if ends[0]:
                longest[0] = max(longest[0], time.perf_counter() - ends[0])

        def has_ended(*_: Any) -> None:
            ends[0] = time.perf_counter()

        transformer = omni.engine.worker.pipeline.transformer
        hooks = [transformer.register_forward_pre_hook(begins), transformer.register_forward_hook(has_ended)]
        made[way] = omni.generate(prompts, params, use_tqdm=False)
        for hook in hooks:
            hook.remove()
        pauses[way].append(1e3 * longest[0])

    jobs: dict[str, Callable[[], None]] = {way: partial(run, way) for way in engines}
    timed = interleaved(jobs, options.repeats)
    pictures = [[np.asarray(output.images[0]).astype(int) for output in made[way]] for way in engines]
    levels = max(int(abs(one - other).max()) for one, other in zip(*pictures, strict=True))
    pause = {way: round(float(np.median(seen)), 1) for way, seen in pauses.items()}
    return {"ratio": paired_ratio(timed["in line"], timed["beside"]), "pause_ms": pause, "levels": levels}


if __name__ == "__main__":
    main()
