"""Mixed-step requests through one engine, against diffusers with its own MagCache one after another.

Both sides run the plans of the published rule without a guard, so full forwards are equal; they are counted. The
batching limit is what the hardware gives at best: transformer time per row at batch 1 / at batch 16, measured in
the same run, in turn. Requests of 10 to 50 steps do not keep 16 rows full to the end; "occupancy limit" is the same
ratio for the batch sizes that really occurred, so that the two losses can be told apart. A second table says where the
time goes on either side; `whole_request_limit` is what whole requests could gain if nothing but the transformer were
batched. Seconds are summed over steps, of each its fastest round (`common.by_step`).

`--size` takes a random-weight model instead of the demo; with "large-1088" a row fills the machine, and
batching gains nothing. Bars: throughput ratio / limit >= 0.9 on the demo; ratio >= 0.98 where batching gains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import SIZES, Stopwatch, arguments, begin, build_flux, by_step, last_line, now, stamped_steps, table

_FORWARDS = 5  # of one size in a row, per round
RULE = {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1}
EQUAL = {"predictor": "reuse", "compute_last_step": False, "curve_resampling": "nearest"}
PROMPTS = ["red apple", "penguin", "guitar", "octopus", "sunflower", "soccer ball", "rainbow", "sailboat"]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--size", choices=list(SIZES), help="random weights instead of the demo model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--min-steps", type=int, default=10)
    parser.add_argument("--max-steps", type=int, default=50)
    options = parser.parse_args()
    result = {"benchmark": "batching", **begin(options), "model": options.size or "demo", "dtype": options.dtype}
    with stamped_steps() as stamps:
        measure(options, result, stamps)


def measure(options: Any, result: dict[str, Any], stamps: list[float]) -> None:
    """Both sides in turn, and the transformer alone."""
    subject = Random(options) if options.size else Demo(options)
    omni, requests = subject.omni, _requests(options)

    def batched() -> list[Any]:
        params = [{"num_inference_steps": steps, "seed": seed} | subject.arguments for _, steps, seed in requests]
        outputs = omni.generate([subject.prompt(request) for request in requests], params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def one_by_one() -> None:
        for request in requests:
            subject.plain(request)

    row_seconds = _row_seconds(omni, batched, stamps)
    jobs: dict[str, Callable[[], Any]] = {"diffusers' MagCache one by one": one_by_one, "engine": batched}
    jobs |= {f"forward of {rows}": run for rows, run in row_seconds.items()}
    timings = by_step(jobs, options.repeats, stamps)

    (sequential, _), (engine, _) = (timings[name] for name in list(jobs)[:2])
    ratio = sequential / engine
    top = max(row_seconds)
    curve = {rows: timings[f"forward of {rows}"][0] / _FORWARDS for rows in row_seconds}
    limit = top * curve[1] / curve[top]
    sizes = _batch_sizes(omni.engine.worker.pipeline, batched)
    alone = _batch_sizes(subject.pipe, one_by_one)
    if sum(rows * count for rows, count in sizes.items()) != alone[1]:
        raise SystemExit(f"unequal work: {sizes} against {alone}")
    occupancy = _occupancy_limit(sizes, curve)
    steps = f"{options.min_steps} to {options.max_steps} steps"
    print(f"{options.requests} requests, {steps}, {result['model']}, {options.dtype}, {alone[1]} full forwards")
    table(
        ["", "fastest steps s", "median s", "spread", "pictures/s"],
        [
            [name, seconds, whole.median, whole.spread, options.requests / seconds]
            for name, (seconds, whole) in timings.items()
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
    where = _profile(omni, subject.pipe, batched, one_by_one)
    share = where["one by one"]["transformer"] / where["one by one"]["total"]
    whole = 1 / (1 - share + share / limit)
    print(f"limit of whole requests, were {1 - share:.2f} of their time shortened by no batch: {whole:.2f}\n")
    last_line(
        result
        | {
            "requests": options.requests,
            "full_forwards": alone[1],
            "seconds_one_by_one": sequential,
            "seconds_engine": engine,
            "throughput_ratio": ratio,
            "batching_limit": limit,
            "ratio_over_limit": ratio / limit,
            "whole_request_limit": whole,
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


class Demo:
    """The demo model, in the engine and in a plain pipeline of its own."""

    def __init__(self, options: Any) -> None:
        from vllm_omni import Omni
        from vllm_omni.diffusion.cache.profile import shipped_profile
        from vllm_omni.diffusion.data import OmniDiffusionConfig
        from vllm_omni.diffusion.loader import load_pipeline
        from vllm_omni.model_folder import generation_defaults

        self._ratios = shipped_profile("demo").ratios
        cache = {"cache_backend": "magcache", "cache_config": RULE | EQUAL | {"mag_ratios": self._ratios}}
        self.omni = Omni("demo", dtype=options.dtype, max_num_seqs=options.requests, **cache)
        self.pipe = load_pipeline(OmniDiffusionConfig(model="demo", dtype=options.dtype))
        self.arguments: dict[str, Any] = {}
        self._defaults = generation_defaults("demo")

    def prompt(self, request: tuple[str, int, int]) -> str:
        return request[0]

    def plain(self, request: tuple[str, int, int]) -> None:
        """One request of diffusers, its own MagCache on."""
        prompt, steps, seed = request
        with _own_cache(self.pipe, steps, self._ratios):
            arguments = self._defaults | {"num_inference_steps": steps}
            self.pipe(prompt, **arguments, generator=torch.Generator("cpu").manual_seed(seed))


class Random:
    """A model of random weights that both sides share, under FLUX's curve."""

    def __init__(self, options: Any) -> None:
        from vllm_omni import Omni
        from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy

        self._bench, served = (bench := build_flux(options.size)), build_flux(options.size, bench)
        for each in (bench, served):
            each.pipe.to(getattr(torch, options.dtype))
        self.pipe, self._ratios = bench.pipe, tuple(FluxMagCacheStrategy.FLUX_MAG_RATIOS)
        self.omni = Omni.from_pipe(
            served.pipe,
            max_num_seqs=options.requests,
            cache_backend="magcache",
            cache_config=RULE | EQUAL | {"mag_ratios": self._ratios},
            defaults={"height": bench.side, "width": bench.side},
        )
        self.arguments = {"output_type": "latent"}

    def prompt(self, request: tuple[str, int, int]) -> dict[str, Any]:
        return self._bench.conditioning(request[2])

    def plain(self, request: tuple[str, int, int]) -> None:
        """One request of diffusers, its own MagCache on."""
        with _own_cache(self.pipe, request[1], self._ratios):
            self._bench.plain(*request[1:])


@contextmanager
def _own_cache(pipe: Any, steps: int, ratios: Sequence[float]) -> Iterator[None]:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(
        threshold=RULE["mag_threshold"],
        max_skip_steps=int(RULE["mag_max_skip_steps"]),
        retention_ratio=RULE["mag_retention_ratio"],
        num_inference_steps=steps,
        mag_ratios=list(ratios),
    )
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def _row_seconds(omni: Any, batched: Callable[[], Any], stamps: list[float]) -> dict[int, Callable[[], Any]]:
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
                    stamps.append(now())

        return run

    return {count: job(count) for count in sorted({1, 2, 4, 8, rows}) if count <= rows}


def _batch_sizes(pipe: Any, job: Callable[[], Any]) -> Counter[int]:
    """Compute forwards by their number of rows, counted at the first attention: diffusers' hook calls every block."""
    sizes: Counter[int] = Counter()
    attention = pipe.transformer.transformer_blocks[0].attn
    handle = attention.register_forward_hook(lambda m, args, kwargs, out: sizes.update([len(out[0])]), with_kwargs=True)
    try:
        job()
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
    for name, pipe, job in (("one by one", plain, one_by_one), ("engine", omni.engine.worker.pipeline, batched)):
        watch = Stopwatch()
        scheduler = type(pipe.scheduler)  # the engine gives every request one of its own
        targets = (
            (type(pipe.transformer), "forward", "transformer"),  # on the module it would be code of its own, and proven
            *((e, "forward", "text encoders") for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None),
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
