"""How cost grows with requests, steps, tokens and blocks: the engine's time, uncached and cached, as a power law.

time = a * x^b: b is fitted by least squares on logarithms, of each job its fastest round. In steps and blocks b is 1
where fixed costs are nothing; in requests it is below 1 as far as batching pays; in tokens it lies between 1
(matrices) and 2 (attention).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench, Size, Timing, arguments, begin, build_flux, interleaved, last_line, table

BASE = {"requests": 1, "steps": 14, "side": 16, "depth": 2}  # 64 image tokens, 2 double and 4 single blocks
SWEEPS = {"requests": (1, 2, 4, 8, 16), "steps": (7, 14, 28, 56), "side": (8, 16, 32, 64), "depth": (1, 2, 4, 8)}
NAMES = {"side": "tokens", "depth": "blocks"}


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--plot", type=Path, help="write a chart here")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "growth", **begin(options), "sweeps": {}}
    for name, values in SWEEPS.items():
        result["sweeps"][NAMES.get(name, name)] = sweep(name, values, options)
    rows = []
    for name, curve in result["sweeps"].items():
        for kind in ("uncached", "cached"):
            rows.append([name, kind, *(f"{s:.3g}" for s in curve[kind]), curve[f"{kind}_exponent"]])
    table(
        ["s over", "", *("x" * (i + 1) for i in range(5)), "exponent"],
        [r[:-1] + [""] * (8 - len(r)) + r[-1:] for r in rows],
    )
    if options.plot:
        plot(result["sweeps"], options.plot)
    last_line(result)


def sweep(name: str, values: tuple[int, ...], options: Any) -> dict[str, Any]:
    jobs: dict[tuple[str, int], Callable[[], Any]] = {}
    for value in values:
        at = BASE | {name: value}
        for kind in ("uncached", "cached"):
            bench = build_flux(Size(at["depth"], 2 * at["depth"], 2, 64, at["side"]))
            jobs[kind, value] = _job(bench, at["requests"], at["steps"], kind == "cached")
    timings: dict[Any, Timing] = interleaved(jobs, options.repeats)
    x = {"side": [(v // 2) ** 2 for v in values], "depth": [3 * v for v in values]}.get(name, list(values))
    curve: dict[str, Any] = {"x": x}
    for kind in ("uncached", "cached"):
        seconds = [timings[kind, value].fastest for value in values]
        slope, _ = np.polyfit(np.log(x), np.log(seconds), 1)
        curve |= {kind: seconds, f"{kind}_exponent": float(slope)}
    return curve


def _job(bench: Bench, requests: int, steps: int, cached: bool) -> Callable[[], Any]:
    from vllm_omni import Omni
    from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy

    engine_args: dict[str, Any] = {"defaults": {"height": bench.side, "width": bench.side}}
    if cached:
        curve = {"mag_ratios": tuple(FluxMagCacheStrategy.FLUX_MAG_RATIOS)}
        engine_args |= {"cache_backend": "magcache", "cache_config": curve}
    omni = Omni.from_pipe(bench.pipe, **engine_args)
    params = [{"num_inference_steps": steps, "seed": i, "output_type": "latent"} for i in range(requests)]

    def run() -> None:
        for output in omni.generate([bench.conditioning(i) for i in range(requests)], params, use_tqdm=False):
            if output.error is not None:
                raise output.error

    return run


def plot(sweeps: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(3.2 * len(sweeps), 3), layout="constrained")
    for axis, (name, curve) in zip(axes, sweeps.items(), strict=True):
        for kind in ("uncached", "cached"):
            label = f"{kind}: exponent {curve[f'{kind}_exponent']:.2f}"
            axis.loglog(curve["x"], curve[kind], "o-", label=label)
        axis.set_xlabel(name)
        axis.set_xticks(curve["x"], [str(x) for x in curve["x"]])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
