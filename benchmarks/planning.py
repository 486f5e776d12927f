"""How long a plan takes: 50 steps with every predictor, and 1,000 steps with the slowest, with the demo's profile.

Bars on one core: 20 ms from a curve, 100 ms from a matrix of 50 steps, 1 s for 1,000 steps.
"""

from __future__ import annotations

import numpy as np
from common import arguments, begin, last_line, seconds_of, table

from vllm_omni.diffusion.cache.plan.compose import compose
from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, parse

LONG = ("affine", 1000, 300)


def main() -> None:
    options = arguments(__doc__).parse_args()
    machine, rounds = begin(options), options.repeats
    profile = shipped_profile("demo")
    cases = [("curve", 50, 25), *((name, 50, 25) for name in PREDICTORS), LONG]
    figures: dict[str, float] = {}
    for name, steps, forwards in cases:
        predictor = "linear" if name == "curve" else name
        settings = parse("magcache", DiffusionCacheConfig(nfe=forwards, predictor=predictor))
        source = profile.model_copy(update={"gram": None}) if name == "curve" else profile
        # Plans are remembered: each round has a schedule of its own.
        schedules = [Schedule(steps, tuple(np.linspace(1, 0.02 + i * 1e-6, steps).tolist()), ()) for i in range(rounds)]
        took = [
            seconds_of(lambda plan=(settings, source.ratios, source, schedule): compose(*plan))
            for schedule in schedules
        ]
        figures[f"{name} {steps}"] = 1e3 * min(took)
    table(["predictor, steps", "ms"], [[name, f"{ms:.1f}"] for name, ms in figures.items()])
    last_line({"benchmark": "planning", **machine, "ms": figures})


if __name__ == "__main__":
    main()
