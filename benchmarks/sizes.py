"""Several sizes at a time: what a mixed load costs, and who waits how long.

Clients that ask again as soon as they have their picture, with mixed sizes, steps, lengths of prompts and caches,
against the same requests one size at a time (all of a size, then the next), in turn, on the demo model. Requests of one
size share forwards, and sizes take turns. Prints the throughput of the mixed load over that of one size at a time, and
of each size the 95th percentile of its latency and the longest time between two steps of a request.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from common import arguments, begin, interleaved, last_line, paired_ratio, table

SIZES, STEPS = (64, 96, 128), (10, 20, 28, 50)
CACHES: tuple[Any, ...] = ("off", {"speedup": 2.0}, {"speedup": 3.0}, None)
PROMPTS = (
    "red apple",
    "penguin",
    "a blue car with two doors",
    "pizza",
    "snowman in the snow",
    "green tree",
    "yellow star",
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    machine = begin(options)
    from vllm_omni import Omni
    from vllm_omni import OmniDiffusionSamplingParams as Params

    draw = random.Random(0)
    asked = [
        (
            draw.choice(PROMPTS),
            Params(
                height=(side := draw.choice(SIZES)), width=side, num_inference_steps=draw.choice(STEPS),
                cache=draw.choice(CACHES), seed=i,
            ),
        )
        for i in range(options.requests)
    ]  # fmt: skip
    groups = {side: [one for one in asked if one[1].height == side] for side in SIZES}
    seen: dict[str, list[Seen]] = {"mixed": [], "one size at a time": []}
    with Omni("demo", cache_backend="magcache", max_num_seqs=16) as omni:
        jobs = {
            "mixed": partial(run, omni, [asked], options.clients, seen["mixed"]),
            "one size at a time": partial(
                run, omni, list(groups.values()), options.clients, seen["one size at a time"]
            ),
        }
        timed = interleaved(jobs, options.repeats)
    ratio = paired_ratio(timed["one size at a time"], timed["mixed"])
    print(f"throughput of the mixed load over one size at a time: {ratio:.3f}")
    figures = {
        f"{way}, {side}": {
            "p95_s": percentile([one.latency for one in own if one.side == side], 0.95),
            "longest_wait_s": max(one.wait for one in own if one.side == side),
            "mean_s": statistics.mean(one.latency for one in own if one.side == side),
        }
        for way, own in seen.items()
        for side in SIZES
    }
    table(["", "p95, s", "mean, s", "longest wait between two calls, s"],
          [[name, f["p95_s"], f["mean_s"], f["longest_wait_s"]] for name, f in figures.items()])  # fmt: skip
    last_line({"benchmark": "sizes", **machine, "requests": options.requests, "ratio": ratio, "cases": figures})


class Seen:
    """One request: its side in pixels, and in seconds its latency and the longest wait between two of its calls."""

    def __init__(self, side: int) -> None:
        self.side, self.began, self.latency, self.wait = side, time.perf_counter(), 0.0, 0.0
        self.step, self.moved = -1, self.began


def run(omni: Any, batches: Sequence[Sequence[Any]], clients: int, seen: list[Seen]) -> None:
    """One batch of requests after the other, each in a closed loop."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import normalise_prompt

    engine = omni.engine
    for requests in batches:
        waiting, running = list(requests), dict[str, Seen]()

        def add(waiting: list[Any] = waiting, running: dict[str, Seen] = running) -> None:
            if waiting:
                prompt, params = waiting.pop(0)
                name = f"{len(waiting)}"
                running[name] = Seen(params.height)
                engine.add_request(OmniDiffusionRequest(name, prompt, normalise_prompt(prompt), params))

        for _ in range(clients):
            add()
        while engine.has_unfinished_requests():
            ended = engine.step()
            now = time.perf_counter()
            for output in engine.progress():
                one = running[output.request_id]
                if output.step != one.step:
                    one.wait = max(one.wait, now - one.moved) if one.step >= 0 else 0.0
                    one.step, one.moved = output.step, now
            for output in ended:
                assert output.ok, output.error
                one = running.pop(output.request_id)
                one.latency = now - one.began
                seen.append(one)
                add()


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main()
