"""What the engine itself costs, uncached: a solo request against plain diffusers, and microseconds per parked call.

Solo: the same pipeline object runs plain and through the engine, in turn. Bar: ratio <= 1.03 where a forward takes
>= 50 ms. Parked calls: a tiny model at 16 concurrent requests; from the engine's time are subtracted the forwards and
the schedulers' steps, and, for "beyond the pipeline", also what plain diffusers itself needs around those (once per
request and per step). Bar: <= 200 us beyond the model and the pipeline's own work.
"""

from __future__ import annotations

from typing import Any

from common import (
    SIZES,
    Bench,
    Stopwatch,
    Timing,
    arguments,
    begin,
    build_flux,
    by_step,
    last_line,
    now,
    stamped_steps,
    table,
)


def main() -> None:
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of the solo measurement")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="concurrent, for the parked calls")
    parser.add_argument("--parked-steps", type=int, default=20)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "tax", **begin(options)}
    result["solo"] = solo(options)
    result["parked"] = parked(options)
    last_line(result)


def solo(options: Any) -> dict[str, Any]:
    """Engine / plain on one pipeline."""
    from vllm_omni import Omni

    bench = build_flux(options.size)
    omni = Omni.from_pipe(bench.pipe, defaults={"height": bench.side, "width": bench.side})
    jobs = {
        "plain diffusers": lambda: bench.plain(options.steps),
        "engine": lambda: _generate(omni, bench, [options.steps]),
    }
    with stamped_steps() as stamps:
        timings = by_step(jobs, options.repeats, stamps)
    (plain, plain_rounds), (engine, engine_rounds) = timings["plain diffusers"], timings["engine"]
    ratio = engine / plain
    print(f"solo, {bench.parameters / 1e6:.1f} M parameters, {options.steps} steps, uncached")
    table(
        ["", "fastest steps s", "ms per step", "median s", "spread", "ratio"],
        [
            ["plain diffusers", plain, 1e3 * plain / options.steps, plain_rounds.median, plain_rounds.spread, 1.0],
            ["engine", engine, 1e3 * engine / options.steps, engine_rounds.median, engine_rounds.spread, ratio],
        ],
    )
    return {
        "parameters": bench.parameters,
        "ms_per_step": 1e3 * plain / options.steps,
        "ratio": ratio,
    }


def parked(options: Any) -> dict[str, Any]:
    """Microseconds around the model and the scheduler, per denoiser call, plain and in the engine."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from vllm_omni import Omni

    bench = build_flux("tiny")
    omni = Omni.from_pipe(bench.pipe, defaults={"height": bench.side, "width": bench.side})
    counts = [options.parked_steps] * options.requests
    calls = sum(counts)
    jobs = {
        "plain diffusers": lambda: [bench.plain(steps, seed) for seed, steps in enumerate(counts)],
        "engine": lambda: _generate(omni, bench, counts),
    }
    rest = {name: Timing() for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(options.repeats):
        for name, job in jobs.items():
            watch = Stopwatch()
            targets = (
                (bench.pipe.transformer, "forward", "forward"),
                (FlowMatchEulerDiscreteScheduler, "step", "step"),
            )
            with watch.watching(*targets):
                began = now()
                job()
                elapsed = now() - began
            rest[name].seconds.append((elapsed - sum(watch.seconds.values())) / calls)
    plain, engine = (1e6 * rest[name].fastest for name in jobs)
    beyond = engine - plain
    print(f"parked calls, {options.requests} concurrent requests of {options.parked_steps} steps, tiny model, uncached")
    table(
        ["us per denoiser call, without forward and scheduler.step", "fastest", "spread"],
        [[name, 1e6 * t.fastest, t.spread] for name, t in rest.items()] + [["engine beyond the pipeline", beyond, ""]],
    )
    return {"us_per_call_engine": engine, "us_per_call_plain": plain, "us_per_call_beyond": beyond}


def _generate(omni: Any, bench: Bench, counts: list[int]) -> None:
    prompts = [bench.conditioning(seed) for seed in range(len(counts))]
    params = [
        {"num_inference_steps": steps, "seed": seed, "output_type": "latent"} for seed, steps in enumerate(counts)
    ]
    for output in omni.generate(prompts, params, use_tqdm=False):
        if output.error is not None:
            raise output.error


if __name__ == "__main__":
    main()
