"""Does a skipped block save its whole time? Speed-up of a cached run over (total block forwards / computed ones).

1.0 means that skipping costs nothing. Compared in one process, on the same random weights: this cache on a plain
pipeline, this cache in the engine, and diffusers' own MagCache hook; "equal" rows run the plan that diffusers runs
(no last-step guard, nearest re-sampling), so that computed forwards are the same.

Seconds are summed over a request's steps, of each step its fastest round (`common.by_step`); every round has another
prompt. A shared machine is fast for some seconds and slow for others, so small models get more rounds.
Bars: >= 0.98 where a forward takes >= 50 ms, >= 0.93 on "small", and not below diffusers' own in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from common import (
    SIZES,
    Bench,
    arguments,
    begin,
    build_flux,
    by_step,
    count_block_forwards,
    last_line,
    now,
    stamped_steps,
    table,
)

EQUAL = {"predictor": "reuse", "compute_last_step": False, "curve_resampling": "nearest"}

_SEEDS = count()  # a prompt comes once


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "large", "small-72", "large-72"])
    parser.add_argument("--seconds", type=float, default=60.0, help="measure each size so long at least (%(default)s)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--threshold", type=float, default=0.24)
    parser.add_argument("--max-skip-steps", type=int, default=5)
    parser.add_argument("--retention-ratio", type=float, default=0.1)
    options = parser.parse_args()
    result = {"benchmark": "efficiency", **begin(options), "sizes": {}}
    for size in options.sizes:
        with stamped_steps() as stamps:
            result["sizes"][size] = measure(size, options, stamps)
    last_line(result)


def measure(size: str, options: Any, stamps: list[float]) -> dict[str, Any]:
    """One model size: every variant's efficiency."""
    from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy

    rule = {
        "mag_threshold": options.threshold,
        "mag_max_skip_steps": options.max_skip_steps,
        "mag_retention_ratio": options.retention_ratio,
        "mag_ratios": tuple(FluxMagCacheStrategy.FLUX_MAG_RATIOS),
    }
    base = build_flux(size)
    variants: dict[str, tuple[Any, Callable[[], Any]]] = {
        "uncached": (base, lambda: base.plain(options.steps, next(_SEEDS)))
    }
    for name, settings in (("standalone", rule), ("standalone, equal plan", rule | EQUAL)):
        variants[name] = _standalone(build_flux(size, base), settings, options.steps)
    for name, settings in (("engine", rule), ("engine, equal plan", rule | EQUAL)):
        variants[name] = _engine(build_flux(size, base), settings, options.steps)
    variants["diffusers MagCache"] = _diffusers(build_flux(size, base), rule, options.steps)

    total = count_block_forwards(base.pipe.transformer, variants["uncached"][1])
    began = now()
    computed = {name: count_block_forwards(bench.pipe.transformer, run) for name, (bench, run) in variants.items()}
    repeats = max(options.repeats, round(options.seconds / (now() - began)))
    timings = by_step({name: run for name, (_, run) in variants.items()}, repeats, stamps)

    plain, _ = timings["uncached"]
    rows, figures = [], {}
    for name, (seconds, whole) in timings.items():
        speedup, ideal = plain / seconds, total / computed[name]
        full = computed[name] * options.steps // total
        rows.append([name, full, seconds, whole.median, whole.spread, speedup, ideal, speedup / ideal])
        figures[name] = {"full_forwards": full, "speedup": speedup, "efficiency": speedup / ideal}
    milliseconds = 1e3 * plain / options.steps
    of = f"{options.steps} steps of {milliseconds:.1f} ms uncached, {repeats} rounds"
    print(f"{size}: {base.parameters / 1e6:.1f} M parameters, {of}")
    headers = ["full forwards", "fastest steps s", "median s", "spread", "speed-up", "blocks saved", "efficiency"]
    table(["", *headers], rows)
    return {"parameters": base.parameters, "ms_per_step": milliseconds, "rounds": repeats, "variants": figures}


def _standalone(bench: Bench, settings: dict[str, Any], steps: int) -> tuple[Bench, Callable[[], Any]]:
    from vllm_omni.diffusion.cache.magcache import MagCacheBackend
    from vllm_omni.diffusion.data import DiffusionCacheConfig

    MagCacheBackend(DiffusionCacheConfig(**settings)).enable(bench.pipe)
    return bench, lambda: bench.plain(steps, next(_SEEDS))


def _engine(bench: Bench, settings: dict[str, Any], steps: int) -> tuple[Bench, Callable[[], Any]]:
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    size = {"height": bench.side, "width": bench.side}
    omni = Omni.from_pipe(bench.pipe, cache_backend="magcache", cache_config=settings, defaults=size)

    def run() -> Any:
        seed = next(_SEEDS)
        params = OmniDiffusionSamplingParams(num_inference_steps=steps, seed=seed, output_type="latent")
        output = omni.generate(bench.conditioning(seed), params, use_tqdm=False)[0]
        if output.error is not None:
            raise output.error
        return output.latents

    return bench, run


def _diffusers(bench: Bench, rule: dict[str, Any], steps: int) -> tuple[Bench, Callable[[], Any]]:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(
        threshold=rule["mag_threshold"],
        max_skip_steps=rule["mag_max_skip_steps"],
        retention_ratio=rule["mag_retention_ratio"],
        num_inference_steps=steps,
        mag_ratios=list(rule["mag_ratios"]),
    )
    bench.pipe.transformer.enable_cache(config)
    return bench, lambda: bench.plain(steps, next(_SEEDS))


if __name__ == "__main__":
    main()
