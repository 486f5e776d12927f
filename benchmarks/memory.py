"""Bytes: what a request holds by predictor and by the dtype residuals are kept in, and what a load peaks at.

The store's own account is exact (every residual is taken from it). Resident memory of a process is what the system
says (VmHWM over its resident size once the model is warm), one new process per number of concurrent requests; on a GPU,
torch's allocator (peak over what the weights take).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, arguments, begin, build_flux, last_line, table

PREDICTORS = ("reuse", "linear")
KEPT = ("model", "bfloat16")
_PROCESS = (
    "import sys; sys.path.insert(0, {folder!r}); import memory; memory.child({size!r}, {requests}, {steps}, {cached})"
)


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


def child(size: str, requests: int, steps: int, cached: bool) -> None:
    """In a process of its own: one JSON line with the peak over what it held before, and the residuals' part of it."""
    load(size, 1, 2, cached)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
    store = load(size, requests, steps, cached)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else _status("VmHWM")
    print(json.dumps({"peak": peak - before, "store": store}), flush=True)


def _status(name: str) -> int:
    """Bytes of this process, by the system's account."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def load(size: str, requests: int, steps: int, cached: bool) -> int:
    """Serve so many requests at once; gives the most bytes their residuals took."""
    return _serve(build_flux(size), requests, steps, {"predictor": "linear"} if cached else None)


def _serve(bench: Any, requests: int, steps: int, cache: dict[str, Any] | None) -> int:
    from vllm_omni import Omni

    engine_args: dict[str, Any] = {"max_num_seqs": requests, "defaults": {"height": bench.side, "width": bench.side}}
    with tempfile.TemporaryDirectory() as folder:
        if cache is not None:
            profile = _profile(bench.pipe.transformer, steps, Path(folder))
            engine_args |= {"cache_backend": "magcache", "cache_config": {"profile": profile} | cache}
        omni = Omni.from_pipe(bench.pipe, **engine_args)
    prompts = [bench.conditioning(i) for i in range(requests)]
    params = [{"num_inference_steps": steps, "seed": i, "output_type": "latent"} for i in range(requests)]
    for output in omni.generate(prompts, params, use_tqdm=False):
        if output.error is not None:
            raise output.error
    return omni.engine.worker.store.peak


def _profile(transformer: Any, steps: int, folder: Path) -> str:
    """A profile for random weights: bytes depend on its shape alone."""
    from vllm_omni.diffusion.cache.profile import CacheProfile, fingerprint

    sigmas = tuple(np.linspace(1.0, 1 / steps, steps).tolist())
    gram = tuple(map(tuple, np.eye(steps).tolist()))
    ones = (1.0,) * steps
    profile = CacheProfile(
        name="bench",
        transformer_class=type(transformer).__name__,
        fingerprint=fingerprint(transformer),
        ratios=ones,
        sigmas=sigmas,
        gram=gram,
    )
    path = folder / "bench.json"
    path.write_text(profile.model_dump_json(), encoding="utf-8")
    return str(path)


def _process(options: Any, requests: int, cached: bool) -> dict[str, Any]:
    folder = str(Path(__file__).resolve().parent)
    code = _PROCESS.format(folder=folder, size=options.size, requests=requests, steps=options.steps, cached=cached)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{requests} requests, cached {cached}: exit status {run.returncode}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
