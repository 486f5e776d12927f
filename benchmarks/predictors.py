"""Plans and predictors at equal full forwards: PSNR in dB to the uncached picture, on the demo model.

Rows: the same number of steps instead of a cache, MagCache's own plan (threshold tuned to that number), and the
planner's, with its own weights ("auto") and with each predictor's. Captions are the held-out ones
(`vllm_omni/quality/pairs.py`), seeds away from calibration, pictures in floats (8-bit rounding would cap the figure);
"worst" is the worst caption.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import begin, last_line, table

STEPS = 28
FIRST_SEED = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--forwards", type=int, nargs="+", default=[14, 9, 7])
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.set_defaults(clock="wall")
    options = parser.parse_args()
    machine = begin(options)
    rows, figures = measure(options)
    headers = ["", *(f"{nfe} mean / worst" for nfe in options.forwards)]
    table(headers, rows)
    last_line({"benchmark": "predictors", **machine, "steps": STEPS, "captions": options.captions, "psnr_db": figures})


def measure(options: Any) -> tuple[list[list[str]], dict[str, dict[int, tuple[float, float]]]]:
    """The table's rows, and (mean, worst) by setting and number of full forwards."""
    from vllm_omni import Omni
    from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
    from vllm_omni.quality.pairs import held_out

    captions = [pair.prompt for pair in held_out("demo", options.captions)]
    figures: dict[str, dict[int, tuple[float, float]]] = {}
    with Omni(options.model, cache_backend="magcache") as omni:
        exact = pictures(omni, captions, "off")

        def note(name: str, nfe: int, cache: Any, steps: int = STEPS) -> None:
            got = pictures(omni, captions, cache, steps, expected=nfe)
            decibels = [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(got, exact, strict=True)]
            figures.setdefault(name, {})[nfe] = (float(np.mean(decibels)), float(np.min(decibels)))

        for nfe in options.forwards:
            note("fewer steps", nfe, "off", steps=nfe)
            rule = tuned_rule(nfe)
            for predictor in PREDICTORS:
                note(f"MagCache plan, {predictor}", nfe, rule | {"predictor": predictor})
            for predictor in ("auto", *PREDICTORS):
                note(f"planned, {predictor}", nfe, {"nfe": nfe, "predictor": predictor})
    rows = [[n, *(f"{mean:.1f} / {worst:.1f}" for mean, worst in row.values())] for n, row in figures.items()]
    return rows, figures


def pictures(omni: Any, captions: list[str], cache: Any, steps: int = STEPS, expected: int = STEPS) -> list[np.ndarray]:
    """Float pictures of all captions, made in one batch; checks how many full forwards each had."""
    from vllm_omni import OmniDiffusionSamplingParams

    params = [
        OmniDiffusionSamplingParams(num_inference_steps=steps, seed=FIRST_SEED + i, cache=cache, output_type="np")
        for i in range(len(captions))
    ]
    outputs = omni.generate(captions, params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
        if output.computed_steps != expected:
            raise SystemExit(f"{cache}: {output.computed_steps} full forwards, not {expected}")
    return [np.asarray(output.images[0], dtype=np.float64) for output in outputs]


def tuned_rule(nfe: int) -> dict[str, float]:
    """Settings of the published rule with `nfe` full forwards on the demo's curve; the paper's K where it can."""
    from vllm_omni.diffusion.cache.plan.rule import magcache_plan
    from vllm_omni.diffusion.cache.profile import shipped_profile

    ratios = shipped_profile("demo").ratios
    for longest in (5, 8, STEPS):
        for threshold in np.geomspace(0.005, 20, 400):
            if sum(magcache_plan(ratios, threshold, longest, 0.1)) == nfe:
                return {"threshold": float(threshold), "max_skip_steps": longest, "retention_ratio": 0.1}
    raise SystemExit(f"the threshold rule has no plan of {nfe} full forwards")


if __name__ == "__main__":
    main()
