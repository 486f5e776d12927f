"""The native operations against their torch twins and against a copy into new memory: time, GB/s, memory.

GB/s counts each tensor once (x and every residual read, the result written), whatever an implementation really moves;
the copy (two streams) shows what the machine gives. "peak" is what was allocated during the call, in results.

Bar: an operation is not slower than its twin where somebody uses it; otherwise it has no place here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, begin, interleaved, last_line, paired_ratio, table

SHAPES = {"demo, 16 rows": (16, 64, 192), "FLUX 1024²": (1, 4096, 3072), "Wan 480p, a quarter": (1, 8192, 5120)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "ops", **begin(options)}
    from vllm_omni.kernels import ops

    if ops.REASON is not None:
        raise SystemExit(f"nothing to compare: {ops.REASON}")
    result["cases"] = [case for dtype in options.dtypes for shape in SHAPES for case in measure(shape, dtype, options)]
    keys = ("op", "shape", "dtype", "kept", "ms", "gb_per_s", "of_copy", "times_twin", "peak", "twin_peak")
    table(keys, [[case[key] for key in keys] for case in result["cases"]])
    last_line(result)


def measure(shape: str, dtype: str, options: Any) -> list[dict[str, Any]]:
    """Every operation on one shape and dtype; residuals kept in the model's dtype and in bf16."""
    from vllm_omni.kernels import ops

    x, y = (torch.randn(SHAPES[shape]).to(DTYPES[dtype]) for _ in range(2))
    cases = []
    for kept in dict.fromkeys((dtype, "bfloat16")):
        r = [torch.randn(SHAPES[shape]).to(DTYPES[kept]) for _ in range(3)]
        for terms in (1, 2, 3):
            call = (x, r[:terms], [1.5, -0.5, 0.25][:terms], [0] * terms)
            moved = 2 * x.nbytes + terms * r[0].nbytes
            native, twin = _of(torch.ops.vllm_omni.forecast, *call), _of(ops.forecast_torch, *call)
            cases.append(_case(f"forecast, {terms} terms", native, twin, x, moved, options))
        rows = [slice(i, i + 1) for i in range(len(x))]
        if len(rows) > 1:  # a batch of requests, two terms each
            parts = [part[row].clone() for row in rows for part in r[:2]]
            call = (x, parts, [1.5, -0.5] * len(rows), [i // 2 for i in range(len(parts))])
            native, twin = _of(torch.ops.vllm_omni.forecast, *call), _of(ops.forecast_torch, *call)
            cases.append(_case("forecast, 2 terms a row", native, twin, x, 2 * x.nbytes + 2 * r[0].nbytes, options))
        native = _of(torch.ops.vllm_omni.residual_norm, x, y, DTYPES[kept])
        twin = _of(ops.residual_norm_torch, x, y, DTYPES[kept])
        cases.append(_case("residual and norm", native, twin, x, 2 * x.nbytes + r[0].nbytes, options))
        for case in cases:
            case.setdefault("kept", kept)
    return [{"shape": shape, "dtype": dtype} | case for case in cases]


def _of(function: Callable[..., Any], *call: Any) -> Callable[[], Any]:
    return lambda: function(*call)


def _case(
    op: str, native: Callable[[], Any], twin: Callable[[], Any], x: torch.Tensor, moved: int, options: Any
) -> dict[str, Any]:
    loops = max(3, 30_000_000 // x.nbytes)
    jobs = {"native": native, "twin": twin, "copy": x.clone}
    looped = {name: (lambda job=job: [job() for _ in range(loops)][-1]) for name, job in jobs.items()}
    timings = interleaved(looped, options.repeats)
    seconds = timings["native"].median / loops
    copy = 2 * x.nbytes * loops / timings["copy"].median
    return {
        "op": op,
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
