"""Bytes: what a request holds by predictor and by the dtype residuals are kept in, and what a load peaks at.

The store's own account is exact (every residual is taken from it). Resident memory of a process is what the system
says (VmHWM over its resident size once the model is warm), one new process per number of concurrent requests; on a GPU,
torch's allocator (peak over what the weights take).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from common import arguments, begin, build_flux, last_line, table

PREDICTORS = ("reuse", "linear", "affine3")
KEPT = ("model", "bfloat16")
_PROCESS = """
import json, re, sys
sys.path.insert(0, "benchmarks")
import torch
from memory import load
from common import DEVICE
def status(field):
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
load({size!r}, 1, 2, {cached})
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
store = load({size!r}, {requests}, {steps}, {cached})
print(json.dumps({{"peak": status("VmHWM") - before, "store": store}}))
"""


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--size", default="small", help="of `common.SIZES` (default %(default)s)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "memory", **begin(options), "size": options.size}
    result["by_predictor"] = [
        {"predictor": predictor, "kept": kept, **held(options, predictor, kept)}
        for predictor in PREDICTORS
        for kept in KEPT
    ]
    table(
        ["predictor", "kept as", "peak bytes per request", "residuals at once"],
        [[c["predictor"], c["kept"], c["bytes"], c["residuals"]] for c in result["by_predictor"]],
    )
    result["by_load"] = [
        {"requests": count, "cached": cached, **_process(options, count, cached)}
        for count in options.concurrent
        for cached in (False, True)
    ]
    table(
        ["concurrent", "cached", "process peak MB", "of it residuals MB"],
        [[c["requests"], c["cached"], c["peak"] / 2**20, c["store"] / 2**20] for c in result["by_load"]],
    )
    last_line(result)


def held(options: Any, predictor: str, kept: str) -> dict[str, float]:
    """Peak of the store for one request, and in residuals of the model's own dtype."""
    bench = build_flux(options.size)
    peak = _serve(bench, 1, options.steps, {"predictor": predictor, "residual_dtype": kept})
    transformer = bench.pipe.transformer
    tokens = (bench.side // 4) ** 2
    one = tokens * transformer.inner_dim * transformer.dtype.itemsize
    return {"bytes": peak, "residuals": peak / one}


def load(size: str, requests: int, steps: int, cached: bool) -> int:
    """Serve so many requests at once; gives the most bytes their residuals took."""
    return _serve(build_flux(size), requests, steps, {"predictor": "linear"} if cached else None)


def _serve(bench: Any, requests: int, steps: int, cache: dict[str, Any] | None) -> int:
    import numpy as np

    from vllm_omni import Omni
    from vllm_omni.diffusion.cache.profile import CacheProfile

    engine_args: dict[str, Any] = {"max_num_seqs": requests, "defaults": {"height": bench.side, "width": bench.side}}
    if cache is not None:
        engine_args |= {"cache_backend": "magcache", "cache_config": {"mag_ratios": [1.0] * steps} | cache}
    omni = Omni.from_pipe(bench.pipe, **engine_args)
    backends = omni.engine.worker._backends.values()
    for backend in backends:  # affine needs a matrix; any will do, for bytes depend on its shape alone
        sigmas = tuple(np.linspace(1.0, 1 / steps, steps).tolist())
        gram = tuple(map(tuple, np.eye(steps).tolist()))
        name = type(bench.pipe.transformer).__name__
        backend.profile = CacheProfile("bench", name, "", (1.0,) * steps, sigmas, gram)
    prompts = [bench.conditioning(i) for i in range(requests)]
    params = [{"num_inference_steps": steps, "seed": i, "output_type": "latent"} for i in range(requests)]
    for output in omni.generate(prompts, params, use_tqdm=False):
        if output.error is not None:
            raise output.error
    return max((backend.store.peak for backend in backends), default=0)


def _process(options: Any, requests: int, cached: bool) -> dict[str, Any]:
    code = _PROCESS.format(size=options.size, requests=requests, steps=options.steps, cached=cached)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
