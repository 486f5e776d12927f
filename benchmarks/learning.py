"""What learning a profile costs the requests that come meanwhile: latency over that of an engine without a cache.

A copy of the demo whose weights are 0.2 % larger, so that no profile is known; each engine in a process of its own, one
after the other, in turn. One client pauses between requests for up to `--pause` seconds, so that trials run in between
and are met half-way. The first requests are those that the profile is learnt from; the others turn the cache off, so
that they are computed whole. Prints the means and medians of both over those of the uncached engine's.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, begin, last_line, table

ENGINES: dict[str, dict[str, Any]] = {
    "uncached": {"cache_backend": "none"},
    "learning": {"cache_backend": "magcache", "cache_config": {"calibrate": "auto"}},
}
PROMPTS = ("red apple", "penguin", "blue car", "pizza", "snowman", "rocket")
LEARNT_FROM = 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=20, help="of each engine in each round")
    parser.add_argument("--pause", type=float, default=2.5)
    options = parser.parse_args()
    machine = begin(options)
    os.environ["OMP_NUM_THREADS"] = str(options.threads or 1)
    waits: dict[str, list[list[float]]] = {name: [] for name in ENGINES}
    trials: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        other_weights(Path(made) / "model")
        for turn in range(options.repeats):
            os.environ["VLLM_OMNI_PROFILES"] = str(Path(made) / f"profiles-{turn}")
            for name in list(ENGINES)[:: -1 if turn % 2 else 1]:
                seconds, told = asyncio.run(ask(str(Path(made) / "model"), ENGINES[name], options, turn))
                waits[name].append(seconds)
                trials += [told] if told else []
    places = {"first requests": slice(0, LEARNT_FROM), "beside trials": slice(LEARNT_FROM, None)}
    figures: dict[str, dict[str, float]] = {}
    for place, own in places.items():
        plain, learning = ([s for one in waits[name] for s in one[own]] for name in ENGINES)
        mean, median = (act(learning) / act(plain) for act in (statistics.mean, statistics.median))
        figures[place] = {"mean": mean, "median": median, "uncached_s": statistics.median(plain), "count": len(plain)}
    rows = [[k, f["count"], f["uncached_s"], f["mean"], f["median"]] for k, f in figures.items()]
    table(["requests", "count", "uncached, s", "mean, over uncached", "median"], rows)
    print("at the end of each round:", *trials, sep="\n  ")
    last_line({"benchmark": "learning", **machine, "cases": figures})


def other_weights(folder: Path) -> None:
    """The demo as another checkpoint."""
    import torch
    from diffusers import DiffusionPipeline

    from vllm_omni.model_folder import resolve_model

    pipeline = DiffusionPipeline.from_pretrained(resolve_model("demo"))
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.002)
    pipeline.save_pretrained(folder)
    shutil.copy(Path(resolve_model("demo")) / "generation_config.json", folder)  # its size, steps and guidance


async def ask(model: str, engine: dict[str, Any], options: Any, turn: int) -> tuple[list[float], str]:
    """Seconds of each request, and what is being learnt at the end."""
    from vllm_omni import OmniDiffusionSamplingParams as Params
    from vllm_omni.engine.client import ProcessEngineClient

    draw, seconds = random.Random(turn), []
    client = await ProcessEngineClient({"model": model, "dtype": "float32", **engine}).start()
    try:
        for i in range(-2, options.requests):
            await asyncio.sleep(draw.uniform(0.0, options.pause))
            steps = 28 if i >= 0 else 5  # the first two load what is loaded once
            params = Params(num_inference_steps=steps, seed=i + 2, cache=None if 0 <= i < LEARNT_FROM else "off")
            began = time.perf_counter()
            async for output in client.generate(PROMPTS[i % len(PROMPTS)], params, f"{turn}-{i}"):
                if output.finished:
                    assert output.ok and output.skipped_steps == 0, output
            if i >= 0:
                seconds.append(time.perf_counter() - began)
        await asyncio.sleep(0.5)
        return seconds, (await client.stats()).learning
    finally:
        await client.shutdown()


if __name__ == "__main__":
    main()
