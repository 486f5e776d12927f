"""Gates against plans: PSNR in dB to the uncached picture by full forwards, on the demo model.

Each gate's threshold is searched for, on two captions, until it makes the wanted number of full forwards on average;
the table gives the average it then makes on the others. Captions and seeds are not those of calibration. TeaCache's
coefficients are fitted on four further captions. The first-block cache is charged for its first block on every step
that it looks at, so its block work is above its full forwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import begin, last_line, table

STEPS = 28
FIRST_SEED = 90_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--forwards", type=int, nargs="+", default=[14, 9])
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.set_defaults(clock="wall")
    options = parser.parse_args()
    machine = begin(options)
    rows, figures = measure(options)
    table(["", *(f"{nfe}: forwards, mean / worst" for nfe in options.forwards)], rows)
    last_line({"benchmark": "gates", **machine, "steps": STEPS, "captions": options.captions, "figures": figures})


def measure(options: Any) -> tuple[list[list[str]], dict[str, list[tuple[float, float, float]]]]:
    """The table's rows, and (full forwards, mean, worst) by setting."""
    import vllm_omni
    from vllm_omni import Omni
    from vllm_omni.quality.pairs import read_prompts

    captions = read_prompts(Path(vllm_omni.__file__).parent / "assets/demo/captions.txt")[::2]
    held_out, tuning, fitting = captions[-options.captions :], captions[:2], captions[2:6]
    figures: dict[str, list[tuple[float, float, float]]] = {}
    with Omni(options.model, cache_backend="magcache") as omni:
        coefficients = fitted(omni.engine.worker.pipeline, fitting)
        exact, _ = pictures(omni, held_out, "off")

        def note(name: str, cache: Any, steps: int = STEPS) -> None:
            got, forwards = pictures(omni, held_out, cache, steps)
            decibels = [-10 * np.log10(max(np.mean((a - b) ** 2), 1e-12)) for a, b in zip(got, exact, strict=True)]
            figures.setdefault(name, []).append((forwards, float(np.mean(decibels)), float(np.min(decibels))))
            print(name, figures[name][-1], flush=True)

        for nfe in options.forwards:
            note("fewer steps", "off", steps=nfe)
            for predictor in ("reuse", "linear"):
                note(f"MagCache rule, {predictor}", rule(nfe) | {"predictor": predictor})
            for predictor in ("linear", "auto"):
                note(f"planned, {predictor}", {"nfe": nfe, "predictor": predictor})
            for gate in ("easycache", "seacache", "teacache", "fbcache"):
                cache = {"backend": gate} | ({"coefficients": coefficients} if gate == "teacache" else {})
                cache |= {"threshold": tuned(omni, tuning, cache, nfe)}
                for predictor in ("reuse", "linear"):
                    note(f"{gate}, {predictor}", cache | {"predictor": predictor})
    return [[n, *(f"{f:.1f}, {m:.1f} / {w:.1f}" for f, m, w in row)] for n, row in figures.items()], figures


def rule(nfe: int) -> dict[str, Any]:
    """MagCache's rule: runs of skips as long as this number of forwards needs."""
    return {"threshold": 0.12, "max_skip_steps": 2, "retention_ratio": 0.15} if nfe >= 14 else {"threshold": 0.5}


def tuned(omni: Any, captions: list[str], cache: dict[str, Any], nfe: int) -> float:
    low, high = 1e-3, 4.0
    for _ in range(6):
        middle = (low * high) ** 0.5
        _, forwards = pictures(omni, captions, cache | {"threshold": middle})
        low, high = (middle, high) if forwards > nfe else (low, middle)
    return high


def fitted(pipeline: Any, captions: list[str]) -> list[float]:
    from vllm_omni.quality.teacache_fit import fit_coefficients

    def run(i: int, caption: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(FIRST_SEED + 500 + i)
        return pipeline(
            caption, num_inference_steps=STEPS, height=64, width=64, generator=generator, output_type="latent"
        )

    runs = [lambda i=i, caption=caption: run(i, caption) for i, caption in enumerate(captions)]
    return list(fit_coefficients(pipeline, runs))


def pictures(omni: Any, captions: list[str], cache: Any, steps: int = STEPS) -> tuple[list[Any], float]:
    """Float pictures, and the average number of full forwards."""
    from vllm_omni import OmniDiffusionSamplingParams as Params

    params = [
        Params(num_inference_steps=steps, seed=FIRST_SEED + i, cache=cache, output_type="np")
        for i in range(len(captions))
    ]
    outputs = omni.generate(captions, params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [output.images[0] for output in outputs], float(np.mean([output.computed_steps for output in outputs]))


if __name__ == "__main__":
    main()
