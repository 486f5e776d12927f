"""Guided requests with both calls of a step in one forward, against call by call: the same engine, the same weights.

For each size, one request and several at once, without a cache and with a budget of a third of the steps. Both engines
run in turn; seconds are summed over steps, of each its fastest round (`common.by_step`). Bars: at least 1.2 times as
fast for one request on the small sizes ("demo", "small-72", "small"), at least 0.98 everywhere,
also where a row fills the machine ("large-1088").
"""

from __future__ import annotations

from typing import Any

import torch
from common import SIZES, arguments, begin, build_flux, by_step, last_line, stamped_steps, table

from vllm_omni import Omni

SIZES_RUN = ["demo", "small-72", "small", "large", "large-1088"]
CURVE = [1.0, *[1.02] * 3, *[0.99] * 24]


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--sizes", nargs="+", choices=["demo", *SIZES], default=SIZES_RUN)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--uncached", action="store_true", help="leave out the runs with a budget")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "guidance", **begin(options), "steps": options.steps, "rows": []}
    with stamped_steps() as stamps:
        for size in options.sizes:
            for count in options.requests:
                for cache in ("off", {"nfe": max(3, options.steps // 3)})[: 1 if options.uncached else 2]:
                    result["rows"].append(measure(options, size, count, cache, stamps))
    table(
        ["size", "requests", "cache", "forwards call by call", "joined", "s call by call", "s joined", "ratio"],
        [list(row.values()) for row in result["rows"]],
    )
    last_line(result)


def measure(options: Any, size: str, count: int, cache: Any, stamps: list[float]) -> dict[str, Any]:
    """Both ways in turn."""
    shared = {"num_inference_steps": options.steps, "output_type": "latent", "true_cfg_scale": 3.0, "cache": cache}
    engines, prompts = _demo(count) if size == "demo" else _random(size, count, shared)
    params = [shared | {"seed": i} for i in range(count)]
    latents: dict[bool, torch.Tensor] = {}

    def job(joins: bool) -> Any:
        def run() -> None:
            outputs = engines[joins].generate(prompts, params, use_tqdm=False)
            for output in outputs:
                if output.error is not None:
                    raise output.error
            latents[joins] = outputs[0].latents

        return run

    jobs = {"call by call": job(False), "joined": job(True)}
    forwards = {}
    for joins, name in ((False, "call by call"), (True, "joined")):
        before = sum(engines[joins].engine.worker.runner.forwards.values())
        jobs[name]()
        forwards[name] = sum(engines[joins].engine.worker.runner.forwards.values()) - before
    apart = float((latents[True] - latents[False]).abs().max() / latents[False].abs().max())
    if apart > 1e-5:
        raise SystemExit(f"the latents are {apart:.1e} apart")
    timings = by_step(jobs, options.repeats, stamps)
    for omni in engines.values():
        omni.close()
    seconds = {name: fastest for name, (fastest, _) in timings.items()}
    return {
        "size": size, "requests": count, "cache": "off" if cache == "off" else f"nfe {cache['nfe']}",
        "forwards": forwards["call by call"], "forwards_joined": forwards["joined"],
        "seconds": seconds["call by call"], "seconds_joined": seconds["joined"],
        "ratio": seconds["call by call"] / seconds["joined"],
    }  # fmt: skip


def _demo(count: int) -> tuple[dict[bool, Omni], list[Any]]:
    """The demo model twice, and its prompts."""
    made = {
        joins: Omni("demo", dtype="float32", cache_backend="magcache", join_guidance=joins) for joins in (False, True)
    }
    return made, [{"prompt": "red apple", "negative_prompt": "penguin"} for _ in range(count)]


def _random(size: str, count: int, shared: dict[str, Any]) -> tuple[dict[bool, Omni], list[Any]]:
    """Two engines over the same random weights, and embeddings as prompts."""
    bench = build_flux(size)
    shared |= {"height": bench.side, "width": bench.side}
    given = [bench.conditioning(i) for i in range(count)]
    config: dict[str, Any] = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}
    made = {
        joins: Omni.from_pipe(build_flux(size, share=bench).pipe, join_guidance=joins, **config)
        for joins in (False, True)
    }
    return made, [one | {f"negative_{name}": -value for name, value in one.items()} for one in given]


if __name__ == "__main__":
    main()
