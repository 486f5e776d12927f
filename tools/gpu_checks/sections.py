"""What is measured of one model. Each section is a function of a `Bench` and yields findings."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from gpu_checks.machines import Machine, launches
from gpu_checks.subjects import Subject

# Largest difference between a request in a batch and alone, in units of the dtype's eps times the largest magnitude:
# kernels that depend on the size of the batch sum in another order, and a solver of higher order makes more of that. In
# float32 it is 6e-5 of the largest magnitude; rows that meet each other's residuals are a thousand times further apart.
ROUNDINGS = {torch.float32: 512.0, torch.bfloat16: 16.0, torch.float16: 32.0}
LONG_S = 0.05  # a forward below that is not held to a bar: launches and Python are much of it
RULE = {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1}
EQUAL = {"predictor": "reuse", "compute_last_step": False, "curve_resampling": "nearest"}  # diffusers' own plan


@dataclass(frozen=True)
class Finding:
    """A figure, what it should be, and whether it is; None if nothing is asked of it."""

    what: str
    value: Any
    wanted: str = ""
    holds: bool | None = None


def at_most(what: str, value: float, most: float, asked: bool = True) -> Finding:
    return Finding(what, value, f"<= {most:g}", value <= most if asked else None)


def at_least(what: str, value: float, least: float, asked: bool = True) -> Finding:
    return Finding(what, value, f">= {least:g}", value >= least if asked else None)


def equals(what: str, value: Any, wanted: Any) -> Finding:
    return Finding(what, value, str(wanted), value == wanted)


@dataclass
class Bench:
    """A model under check: its engine, and how much of everything is run."""

    machine: Machine
    subject: Subject
    steps: int
    rows: int
    rounds: int
    omni: Any = field(init=False)

    def __post_init__(self) -> None:
        from vllm_omni import Omni

        self.omni = Omni.from_pipe(
            self.subject.pipeline,
            defaults=self.subject.arguments,
            cache_backend="magcache",
            cache_config={"steps_mask": self.mask(self.steps), "predictor": "linear"},
            max_num_seqs=self.rows,
        )

    def is_long(self, step_s: float) -> bool:
        """Whether a step's seconds are the denoiser's; on the fake device they are the harness's own."""
        return step_s >= LONG_S and self.machine.kind != "fake"

    def mask(self, steps: int) -> list[int]:
        """Every second step is skipped; the first two and the last are computed."""
        return [int(step < 2 or step == steps - 1 or step % 2 == 0) for step in range(steps)]

    def cached(self, steps: int) -> dict[str, Any]:
        return {"steps_mask": self.mask(steps), "predictor": "linear"}

    def run(self, steps: list[int], cache: Any, first: int = 0, fails: bool = False) -> list[Any]:
        """The outputs of one request per entry of `steps`, at once. What fails is raised unless that is looked for."""
        asked = [
            {
                "num_inference_steps": count,
                "seed": first + i,
                "output_type": "latent",
                "cache": self.cached(count) if cache == "mask" else cache,
            }
            for i, count in enumerate(steps)
        ]
        prompts = [self.subject.prompt(first + i) for i in range(len(steps))]
        outputs = self.omni.generate(prompts, asked, use_tqdm=False)
        for output in outputs:
            if output.error is not None and not fails:
                raise output.error
        return outputs

    def fastest(self, *jobs: Callable[[], Any]) -> list[float]:
        """Seconds of each job, the fastest of several rounds in turn; a first round does not count."""
        seconds: list[list[float]] = [[] for _ in jobs]
        for round_ in range(self.rounds + 1):
            for job, of in zip(jobs, seconds, strict=True):
                taken = self.machine.seconds(job)
                if round_:
                    of.append(taken)
        return [min(of) for of in seconds]

    @property
    def store(self) -> Any:
        return self.omni.engine.worker._backends["magcache"].store

    def used(self) -> int:
        gc.collect()
        return self.machine.used() or 0


def roundings(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference in units of eps times the largest magnitude; infinite if a number is not finite."""
    left, right = got.double().cpu(), wanted.double().cpu()
    if left.shape != right.shape or not (left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return float((left - right).abs().max() / (torch.finfo(wanted.dtype).eps * right.abs().max()))


def isolation(bench: Bench) -> Iterator[Finding]:
    """A request in a batch against the same alone, and alone against plain diffusers."""
    steps = [bench.steps - i % 3 for i in range(min(4, bench.rows))]
    joint = bench.run(steps, "mask")
    alone = [bench.run([count], "mask", first=i)[0] for i, count in enumerate(steps)]
    apart = max(roundings(a.latents, b.latents) for a, b in zip(joint, alone, strict=True))
    bound = ROUNDINGS[alone[0].latents.dtype]
    yield at_most(f"{len(steps)} requests at once, from each alone, in roundings", apart, bound)
    same = all(torch.equal(a.latents, b.latents) for a, b in zip(joint, alone, strict=True))
    yield Finding("of them bit by bit", same)
    (uncached,) = bench.run([bench.steps], "off")
    plain = bench.subject.plain(0, bench.steps)
    yield at_most("alone, uncached, from plain diffusers, in roundings", roundings(uncached.latents, plain), bound)
    yield Finding("of it bit by bit", torch.equal(uncached.latents, plain))  # guidance in one forward is not


def efficiency(bench: Bench) -> Iterator[Finding]:
    """Whether a skipped step saves its whole time, and what the engine costs a request that skips none."""
    steps = bench.steps
    computed = bench.run([steps], "mask")[0].computed_steps
    plain, off, on = bench.fastest(
        lambda: bench.subject.plain(0, steps), lambda: bench.run([steps], "off"), lambda: bench.run([steps], "mask")
    )
    long = bench.is_long(plain / steps)
    yield Finding("ms per step, plain diffusers", 1e3 * plain / steps)
    yield at_least("speed-up / (steps / computed steps)", off / on / (steps / computed), 0.98, long)
    yield at_most("tax: the engine uncached / plain diffusers", off / plain, 1.03, long)


def batching(bench: Bench) -> Iterator[Finding]:
    """Requests at once against one by one, and how much of what the denoiser's own forward gains."""
    steps, rows = bench.steps, bench.rows
    alone, joint = bench.fastest(lambda: bench.run([steps], "off"), lambda: bench.run([steps] * rows, "off"))
    per_row = {}
    for count in (1, rows):
        bench.omni.engine.reports()
        bench.run([steps] * count, "off")
        bench.machine.synchronize()
        whole = [r.forward_s / r.rows for r in bench.omni.engine.reports() if r.rows == count]
        per_row[count] = min(whole, default=float("nan"))
    ratio, limit = alone * rows / joint, per_row[1] / per_row[rows]
    yield Finding(f"{rows} requests at once: throughput over one by one", ratio)
    yield Finding("the denoiser's own gain, by device time", limit)
    yield at_least("share of it", ratio / limit, 0.9, bench.is_long(alone / steps))


def memory(bench: Bench) -> Iterator[Finding]:
    """Bytes of a row, of residuals against what is planned, and requests on a device that is short of memory."""
    steps, rows, subject = bench.steps, bench.rows, bench.subject
    bench.store.peak = 0
    before = bench.used()
    plain = bench.machine.peak(lambda: bench.run([steps] * rows, "off"))
    one = bench.machine.peak(lambda: bench.run([steps], "off"))
    bench.run([steps] * rows, "mask")
    tokens = subject.tokens or _tokens(bench)
    planned = 2 * rows * subject.branches * tokens * subject.width * subject.dtype.itemsize
    yield at_most(f"residual bytes of {rows} requests / planned", bench.store.peak / planned, 1.0)
    if plain is None or one is None:
        return
    yield Finding("MiB in use before", before / 2**20)
    yield Finding("MiB of a row alone, uncached", (one - before) / 2**20)
    yield Finding(f"MiB of each of {rows} rows", (plain - before) / rows / 2**20)
    yield Finding("by the engine", bench.omni.engine.worker.runner.room.told())
    limit = max(before + (plain - before) // 4, int(before + 1.1 * (one - before)))
    seconds, failed = {}, {}
    for cache in ("off", "mask"):
        with bench.machine.limited(limit):
            outputs: list[Any] = []

            def short(cache: str = cache, outputs: list[Any] = outputs) -> None:
                outputs[:] = bench.run([steps] * rows, cache, fails=True)

            short()
            seconds[cache] = bench.machine.seconds(short)
            failed[cache] = sum(output.error is not None for output in outputs)
    long = bench.is_long(seconds["off"] / rows / steps)
    share = f"with {limit >> 20} MiB, a quarter of what {rows} rows take"
    yield at_most(f"{share}: failed of {rows} with the cache, beyond those without", failed["mask"] - failed["off"], 0)
    yield at_least(f"{share}: throughput with the cache over without", seconds["off"] / seconds["mask"], 1.0, long)


def peers(bench: Bench) -> Iterator[Finding]:
    """The same rule by diffusers' own MagCache, and cache-dit with this plan, one request alone."""
    from diffusers import MagCacheConfig

    from vllm_omni.diffusion.cache.magcache import FluxMagCacheStrategy

    curve, steps, subject = list(FluxMagCacheStrategy.FLUX_MAG_RATIOS), bench.steps, bench.subject
    rule = {"mag_ratios": tuple(curve)} | RULE | EQUAL
    transformer = subject.pipeline.transformer
    (ours,) = bench.fastest(lambda: bench.run([steps], rule))
    computed = bench.run([steps], rule)[0].computed_steps
    config = MagCacheConfig(
        threshold=0.24, max_skip_steps=5, retention_ratio=0.1, num_inference_steps=steps, mag_ratios=curve
    )
    fewer, theirs = bench.fastest(lambda: subject.plain(0, computed), lambda: _with_own_cache(bench, config))
    yield Finding("full forwards of a request", computed)
    yield at_least("diffusers' MagCache / ours, equal plan", theirs / ours, 1.0, bench.is_long(ours / computed))
    yield Finding("plain diffusers with as few steps / ours", fewer / ours)
    if find_spec("cache_dit") is not None and "Flux" in type(transformer).__name__:
        with _cache_dit(subject.pipeline, bench.mask(steps)):
            (dit,) = bench.fastest(lambda: subject.plain(0, steps))
        (masked,) = bench.fastest(lambda: bench.run([steps], "mask"))
        yield Finding("cache-dit / ours, the same steps", dit / masked)


def predictions(bench: Bench) -> Iterator[Finding]:
    """What was found without a GPU, against this device."""
    steps = bench.steps
    for name, finding in _launches(bench).items():
        yield Finding(f"kernels launched {name}", finding)
    waits = bench.machine.waits(lambda: bench.run([steps], "mask"))
    if waits is not None:
        longer = bench.machine.waits(lambda: bench.run([2 * steps], "mask")) or []
        more = Counter(longer) - Counter(waits)
        yield equals("waits of the host on a planned step, ours", sum(n for (ours, _), n in more.items() if ours), 0)
        yield Finding("and the pipeline's, per step", sum(n for (ours, _), n in more.items() if not ours) / steps)
        for (ours, line), count in more.most_common(3):
            yield Finding(f"  by {'us' if ours else 'them'}: {line}", count / steps)
    wall, told = min((_timed(bench) for _ in range(max(3, bench.rounds))), key=lambda timed: timed[0])
    share = sum(told[name] for name in ("queue_s", "encode_and_denoise_s", "decode_s")) / wall
    asked = bench.is_long(wall / steps) or bench.machine.kind == "fake"  # else Python between the spans is a part of it
    holds = 0.9 <= share <= 1.1 if asked else None
    yield Finding("reported seconds / seconds to an idle device", share, "0.9 to 1.1", holds)


def _timed(bench: Bench) -> tuple[float, dict[str, float]]:
    """Seconds of a planned request from an idle device to an idle device, and the durations that it reports."""
    outputs: list[Any] = []
    wall = bench.machine.seconds(lambda: outputs.extend(bench.run([bench.steps], "mask")))
    return wall, outputs[0].stage_durations


SECTIONS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "isolation": isolation,
    "efficiency and tax": efficiency,
    "batching": batching,
    "peers": peers,
    "predictions": predictions,
    "memory": memory,  # after what a shortage would change: the engine remembers it for a while
}


def _tokens(bench: Bench) -> int:
    """Tokens of a row, seen at the first block."""
    seen: list[int] = []
    blocks = next(m for m in bench.subject.pipeline.transformer.children() if isinstance(m, torch.nn.ModuleList))

    def note(module: Any, given: Any, named: Any) -> None:
        seen.append((named["hidden_states"] if "hidden_states" in named else given[0]).shape[1])

    handle = blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        bench.run([2], "off")
    finally:
        handle.remove()
    return seen[0]


def _launches(bench: Bench) -> dict[str, Any]:
    """Per computed and skipped step: as the dispatcher counts, and as the device does."""
    steps, found = bench.steps, {}
    skipped = steps - sum(bench.mask(steps))
    jobs: dict[str, Callable[[], Any]] = {
        "plain": lambda: bench.subject.plain(0, steps),
        "plain, more": lambda: bench.subject.plain(0, steps + 2),
        "off": lambda: bench.run([steps], "off"),
        "more": lambda: bench.run([steps + 2], "off"),
        "mask": lambda: bench.run([steps], "mask"),
    }
    for by, count in (("predicted", launches), ("on the device", bench.machine.kernels)):
        counts = {name: count(job) for name, job in jobs.items()}
        if None in counts.values():
            continue
        computed = (counts["more"] - counts["off"]) / 2
        found[f"by plain diffusers per step, {by}"] = (counts["plain, more"] - counts["plain"]) / 2
        found[f"per computed step, {by}"] = computed
        found[f"per skipped step, {by}"] = computed + (counts["mask"] - counts["off"]) / skipped
    return found


def _with_own_cache(bench: Bench, config: Any) -> None:
    transformer = bench.subject.pipeline.transformer
    transformer.enable_cache(config)
    try:
        bench.subject.plain(0, bench.steps)
    finally:
        transformer.disable_cache()


@contextmanager
def _cache_dit(pipeline: Any, mask: list[int]) -> Iterator[None]:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, steps_computation_mask=mask, num_inference_steps=len(mask)
    )
    cache_dit.enable_cache(pipeline, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipeline)
