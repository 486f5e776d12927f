"""Mixed-step requests through one engine, against diffusers one after another with the same cache and seeds.

The batching limit is what the hardware gives at best: transformer time per row at batch 1 / at batch 16, measured in
the same run, in turn. Requests of 10 to 50 steps do not keep 16 rows full to the end; "occupancy limit" is the same
ratio for the batch sizes that really occurred, so that the two losses can be told apart. A second table says where the
time goes on either side.

Bar: throughput ratio / limit >= 0.8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import Stopwatch, arguments, begin, interleaved, last_line, now, paired_ratio, table

_FORWARDS = 10  # of one size in a row, per round
PROMPTS = ["red apple", "penguin", "guitar", "octopus", "sunflower", "soccer ball", "rainbow", "sailboat"]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--model", default="demo", help="shipped name or diffusers folder (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--min-steps", type=int, default=10)
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--no-cache", action="store_true", help="both sides uncached")
    options = parser.parse_args()
    result = {"benchmark": "batching", **begin(options), "model": options.model, "dtype": options.dtype}

    from vllm_omni import Omni

    engine_args: dict[str, Any] = {"dtype": options.dtype, "max_num_seqs": options.requests}
    settings = None if options.no_cache else _cache_settings(options)
    if settings is not None:
        engine_args |= {"cache_backend": "magcache", "cache_config": settings}
    omni = Omni(options.model, **engine_args)
    plain = _PlainPipeline(options, settings)
    requests = _requests(options)

    def batched() -> list[Any]:
        params = [{"num_inference_steps": steps, "seed": seed} for _, steps, seed in requests]
        outputs = omni.generate([prompt for prompt, _, _ in requests], params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def one_by_one() -> None:
        for prompt, steps, seed in requests:
            plain.run(prompt, steps, seed)

    row_seconds = _row_seconds(omni, batched, options)
    jobs: dict[str, Callable[[], Any]] = {"diffusers one by one": one_by_one, "engine": batched}
    jobs |= {f"forward of {rows}": run for rows, run in row_seconds.items()}
    timings = interleaved(jobs, options.repeats)

    sequential, engine = timings["diffusers one by one"], timings["engine"]
    ratio = paired_ratio(sequential, engine)
    top = max(row_seconds)
    limit = top * paired_ratio(timings["forward of 1"], timings[f"forward of {top}"])
    sizes = _batch_sizes(omni, batched)
    curve = {rows: timings[f"forward of {rows}"].median / _FORWARDS for rows in row_seconds}
    occupancy = _occupancy_limit(sizes, curve)
    steps = f"{options.min_steps} to {options.max_steps} steps"
    print(f"{options.requests} requests, {steps}, {options.model}, {options.dtype}")
    table(
        ["", "median s", "spread", "pictures/s"],
        [
            [name, t.median, t.spread, options.requests / t.median]
            for name, t in timings.items()
            if "forward" not in name
        ],
    )
    table(
        ["transformer rows", "ms per row", "times batch 1"],
        [[rows, 1e3 * t / rows, curve[1] * rows / t] for rows, t in curve.items()],
    )
    table(
        ["", "value", "throughput ratio / value"],
        [
            ["throughput ratio", ratio, 1.0],
            [f"batching limit at {top} rows", limit, ratio / limit],
            ["occupancy limit (batches as they occurred)", occupancy, ratio / occupancy],
        ],
    )
    where = _profile(omni, plain, batched, one_by_one)
    last_line(
        result
        | {
            "cache": settings,
            "requests": options.requests,
            "seconds_one_by_one": sequential.median,
            "seconds_engine": engine.median,
            "throughput_ratio": ratio,
            "batching_limit": limit,
            "ratio_over_limit": ratio / limit,
            "occupancy_limit": occupancy,
            "ratio_over_occupancy_limit": ratio / occupancy,
            "compute_forwards_by_rows": dict(sorted(sizes.items())),
            "where_ms": where,
        }
    )


def _requests(options: Any) -> list[tuple[str, int, int]]:
    """(prompt, steps, seed); step counts spread evenly, in an order that mixes short and long."""
    last = max(options.requests - 1, 1)
    span = options.max_steps - options.min_steps
    order = [(7 * i) % options.requests if options.requests % 7 else i for i in range(options.requests)]
    return [(PROMPTS[i % len(PROMPTS)], options.min_steps + round(span * k / last), i) for i, k in enumerate(order)]


def _cache_settings(options: Any) -> dict[str, Any]:
    """The checkpoint's own profile; a model without one gets the FLUX curve, and the JSON line says so."""
    from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy, MagCacheBackend
    from vllm_omni.diffusion.data import DiffusionCacheConfig
    from vllm_omni.errors import InvalidValueError

    probe = MagCacheBackend(DiffusionCacheConfig())
    try:
        probe.enable(_load(options))
    except InvalidValueError:
        return {"mag_ratios": tuple(FluxMagCacheStrategy.FLUX_MAG_RATIOS)}
    return {}


def _load(options: Any) -> Any:
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import load_pipeline

    return load_pipeline(OmniDiffusionConfig(model=options.model, dtype=options.dtype))


class _PlainPipeline:
    """Plain diffusers with the cache on it, called with the model's own defaults."""

    def __init__(self, options: Any, settings: dict[str, Any] | None) -> None:
        from vllm_omni.diffusion.cache.magcache import MagCacheBackend
        from vllm_omni.diffusion.data import DiffusionCacheConfig
        from vllm_omni.diffusion.loader import generation_defaults

        self.pipe = _load(options)
        self.defaults = generation_defaults(options.model)
        if settings is not None:
            MagCacheBackend(DiffusionCacheConfig(**settings)).enable(self.pipe)

    def run(self, prompt: str, steps: int, seed: int) -> Any:
        arguments = self.defaults | {"num_inference_steps": steps}
        return self.pipe(prompt, **arguments, generator=torch.Generator("cpu").manual_seed(seed)).images[0]


def _row_seconds(omni: Any, batched: Callable[[], Any], options: Any) -> dict[int, Callable[[], Any]]:
    """A job per batch size: the transformer alone, on arguments that the engine really joined."""
    transformer = omni.engine.worker.pipeline.transformer
    caught: list[dict[str, Any]] = []
    handle = transformer.register_forward_pre_hook(lambda m, args, kwargs: caught.append(kwargs), with_kwargs=True)
    try:
        batched()
    finally:
        handle.remove()
    full = max(caught, key=lambda kwargs: len(kwargs["hidden_states"]))
    rows = len(full["hidden_states"])
    joined = {
        name
        for name, v in full.items()
        if isinstance(v, torch.Tensor) and v.ndim and len(v) == rows and "ids" not in name
    }

    def job(count: int) -> Callable[[], Any]:
        part = full | {name: full[name][:count] for name in joined}

        def run() -> None:
            with torch.inference_mode():
                for _ in range(_FORWARDS):
                    transformer(**part)

        return run

    return {count: job(count) for count in sorted({1, 2, 4, 8, rows}) if count <= rows}


def _batch_sizes(omni: Any, batched: Callable[[], Any]) -> Counter[int]:
    """Compute forwards by their number of rows."""
    transformer = omni.engine.worker.pipeline.transformer
    sizes: Counter[int] = Counter()
    block = transformer.transformer_blocks[0]
    handle = block.register_forward_hook(lambda m, args, kwargs, out: sizes.update([len(out[0])]), with_kwargs=True)
    try:
        batched()
    finally:
        handle.remove()
    return sizes


def _occupancy_limit(sizes: Counter[int], curve: dict[int, float]) -> float:
    """Row by row at batch 1, over the same rows in the batches that occurred; between measured sizes, a line."""

    def seconds(rows: int) -> float:
        known = sorted(curve)
        high = next((k for k in known if k >= rows), known[-1])
        low = max((k for k in known if k <= rows), default=known[0])
        if high == low:
            return curve[low]
        return curve[low] + (curve[high] - curve[low]) * (rows - low) / (high - low)

    alone = sum(rows * count for rows, count in sizes.items()) * curve[1]
    return alone / sum(seconds(rows) * count for rows, count in sizes.items())


def _profile(omni: Any, plain: Any, batched: Callable[[], Any], one_by_one: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds by part of the work, each side run once more with stopwatches on."""
    where: dict[str, dict[str, float]] = {}
    for name, pipe, job in (("one by one", plain.pipe, one_by_one), ("engine", omni.engine.worker.pipeline, batched)):
        watch = Stopwatch()
        transformer = pipe.transformer

        def kind(transformer: Any = transformer) -> str:
            return "transformer, computed" if len(transformer.transformer_blocks) > 1 else "transformer, skipped"

        # a standalone cache watches the scheduler itself; the engine gives every request one of its own
        scheduler = pipe.scheduler if "step" in vars(pipe.scheduler) else type(pipe.scheduler)
        targets = (
            (transformer, "forward", kind),
            (type(pipe), "encode_prompt", "encode_prompt"),
            (pipe.vae, "decode", "vae.decode"),
            (scheduler, "step", "scheduler.step"),
            (scheduler, "set_timesteps", "scheduler.set_timesteps"),
            (pipe.image_processor, "postprocess", "postprocess"),
        )
        with watch.watching(*targets):
            began = now()
            job()
            total = now() - began
        where[name] = {part: 1e3 * s for part, s in watch.seconds.items()}
        where[name]["python of pipeline and engine"] = 1e3 * (total - sum(watch.seconds.values()))
        where[name]["total"] = 1e3 * total
    parts = list(where["engine"])
    table(
        ["ms in", *where, "saved by"], [[p, *(w.get(p, 0.0) for w in where.values()), _times(where, p)] for p in parts]
    )
    return where


def _times(where: dict[str, dict[str, float]], part: str) -> str:
    before, after = where["one by one"].get(part, 0.0), where["engine"][part]
    return f"{before / after:.2f}x" if after else ""


if __name__ == "__main__":
    main()
