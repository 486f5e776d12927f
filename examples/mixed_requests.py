"""One call, one batch: every request has its own steps, seed and cache settings, and none disturbs another."""

import argparse
from pathlib import Path

from vllm_omni import Omni, OmniDiffusionSamplingParams

REQUESTS = [  # prompt, steps, seed, cache (None: the engine's setting)
    ("rocket", 28, 1, None),
    ("rocket", 28, 1, "off"),
    ("banana", 12, 2, "high"),
    ("octopus", 40, 3, {"threshold": 0.1, "max_skip_steps": 3}),
    ("sunflower", 20, 4, {"predictor": "reuse"}),
    ("panda face", 10, 5, {"steps_mask": [1, 0] * 5}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the pictures (%(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    parameters = [OmniDiffusionSamplingParams(num_inference_steps=n, seed=s, cache=c) for _, n, s, c in REQUESTS]
    with Omni("demo", cache_backend="magcache") as omni:
        outputs = omni.generate([prompt for prompt, *_ in REQUESTS], parameters)
    print(f"{'prompt':<12} {'steps':>5} {'computed':>8} {'skipped':>7}  cache")
    for index, ((prompt, steps, _, cache), output) in enumerate(zip(REQUESTS, outputs, strict=True)):
        if output.error is not None:
            print(f"{prompt:<12} failed: {output.error}")
            continue
        output.images[0].save(out / f"{index}_{prompt.replace(' ', '_')}.png")
        counts = f"{output.computed_steps:>8} {output.skipped_steps:>7}"
        print(f"{prompt:<12} {steps:>5} {counts}  {cache or 'engine setting'}")


if __name__ == "__main__":
    main()
