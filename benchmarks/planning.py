"""How long a plan takes, of 28 to 1,000 steps, with the demo's profile and from its curve alone.

Bars on one core: 20 ms from a curve, 500 ms from a matrix, whatever the number of steps.
"""

from __future__ import annotations

import numpy as np
from common import arguments, begin, last_line, seconds_of, table

from vllm_omni.diffusion.cache.plan.compose import compose
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig, parse

CASES = (("curve", 50, 25), *(("matrix", steps, steps // 2) for steps in (28, 50, 100)), ("matrix", 1000, 300))


def main() -> None:
    options = arguments(__doc__).parse_args()
    machine, rounds = begin(options), options.repeats
    profile = shipped_profile("demo")
    figures: dict[str, float] = {}
    for name, steps, forwards in CASES:
        settings = parse("magcache", DiffusionCacheConfig(nfe=forwards))
        source = profile.curve_alone() if name == "curve" else profile.model_copy(update={"budgets": ()})
        # Plans are remembered: each round has a schedule of its own.
        schedules = [Schedule(steps, tuple(np.linspace(1, 0.02 + i * 1e-6, steps).tolist()), ()) for i in range(rounds)]
        took = [
            seconds_of(lambda plan=(settings, source.ratios, source, schedule): compose(*plan))
            for schedule in schedules
        ]
        figures[f"{name} {steps}"] = 1e3 * min(took)
    table(["from, steps", "ms"], [[name, f"{ms:.1f}"] for name, ms in figures.items()])
    last_line({"benchmark": "planning", **machine, "ms": figures})


if __name__ == "__main__":
    main()
