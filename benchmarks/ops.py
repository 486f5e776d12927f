"""The native forecast against its torch twin and against a copy into new memory: time, GB/s, memory.

GB/s counts each tensor once (x and every residual read, the result written), whatever an implementation really moves;
the copy (two streams) shows what the machine gives. "peak" is what was allocated during the call, in results.

Bar: it is not slower than its twin in any case that `ops.forecast` gives it; otherwise that case is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, begin, interleaved, last_line, paired_ratio, table

SHAPES = {"demo, 16 rows": (16, 64, 192), "FLUX 1024²": (1, 4096, 3072), "Wan 480p, a quarter": (1, 8192, 5120)}


def main() -> None:
    options = arguments(__doc__, repeats=7).parse_args()
    result: dict[str, Any] = {"benchmark": "ops", **begin(options)}
    from vllm_omni.kernels import ops

    if ops.REASON is not None:
        raise SystemExit(f"nothing to compare: {ops.REASON}")
    result["cases"] = [case for shape in SHAPES for case in measure(shape, options)]
    keys = ("terms", "shape", "ms", "gb_per_s", "of_copy", "times_twin", "peak", "twin_peak")
    table(keys, [[case[key] for key in keys] for case in result["cases"]])
    last_line(result)


def measure(shape: str, options: Any) -> list[dict[str, Any]]:
    """Every case of one shape."""
    from vllm_omni.kernels import ops

    x, *r = (torch.randn(SHAPES[shape]).bfloat16() for _ in range(4))
    calls: dict[str, tuple[Any, ...]] = {
        f"{terms}": (x, r[:terms], [1.5, -0.5, 0.25][:terms], [0] * terms) for terms in (2, 3)
    }
    if len(x) > 1:  # a batch of requests
        parts = [part[i : i + 1].clone() for i in range(len(x)) for part in r[:2]]
        calls["2 a row"] = (x, parts, [1.5, -0.5] * len(x), [i // 2 for i in range(len(parts))])
    cases = []
    for terms, call in calls.items():
        native, twin = _of(torch.ops.vllm_omni.forecast, *call), _of(ops.forecast_torch, *call)
        moved = 2 * x.nbytes + (2 if "row" in terms else int(terms)) * x.nbytes
        cases.append({"terms": terms, "shape": shape} | _case(native, twin, x, moved, options))
    return cases


def _of(function: Callable[..., Any], *call: Any) -> Callable[[], Any]:
    return lambda: function(*call)


def _case(
    native: Callable[[], Any], twin: Callable[[], Any], x: torch.Tensor, moved: int, options: Any
) -> dict[str, Any]:
    loops = max(3, 30_000_000 // x.nbytes)
    jobs = {"native": native, "twin": twin, "copy": x.clone}
    looped = {name: (lambda job=job: [job() for _ in range(loops)][-1]) for name, job in jobs.items()}
    timings = interleaved(looped, options.repeats)
    seconds = timings["native"].median / loops
    copy = 2 * x.nbytes * loops / timings["copy"].median
    return {
        "ms": 1e3 * seconds,
        "gb_per_s": moved / seconds / 1e9,
        "of_copy": moved / seconds / copy,
        "times_twin": paired_ratio(timings["twin"], timings["native"]),
        "peak": _peak(native) / x.nbytes,
        "twin_peak": _peak(twin) / x.nbytes,
    }


def _peak(job: Callable[[], Any]) -> float:
    """Bytes allocated at most during the call, by the allocator's own account."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = job()
    del kept
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


if __name__ == "__main__":
    main()
