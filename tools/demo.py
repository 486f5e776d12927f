"""Draw a dozen pictures three times through one engine: without a cache, with MagCache, and with fewer steps.

Requests with different step counts and seeds arrive while others run, and share one continuous batch. Written to --out:

  grid.png    per prompt: without the cache, with it, and the difference of the two
  steps.png   per request: which of its steps were computed and which were skipped

The table compares each cached picture with the uncached one, and with the control that has only as many steps as the
cache computed: the cache is worth having where its picture is the nearer one. Each cached picture is also drawn alone;
max_isolation_error is the largest difference from the same picture drawn in the batch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

STEPS_OF_PROMPTS = {
    "red apple": 28,
    "cat face": 50,
    "rocket": 20,
    "banana": 10,
    "penguin": 40,
    "guitar": 24,
    "hamburger": 14,
    "rainbow": 32,
    "octopus": 45,
    "sunflower": 16,
    "panda face": 36,
    "birthday cake": 12,
}
QUICK = {"red apple": 10, "cat face": 8, "rocket": 6, "banana": 4}
ARRIVE_EVERY = 3  # engine steps between two arrivals
AMPLIFY = 64  # of the difference row
ENLARGE = 3
COLUMNS = 6
INK, PAPER, FILLED, LIGHT, EDGE = "#1c2430", "#ffffff", "#2166ac", "#e3eaf2", "#b6c4d4"
Outputs = list[Any]


@dataclass(frozen=True)
class Ask:
    """One request of the demo."""

    prompt: str
    steps: int
    seed: int
    cache: Any = None  # the engine's setting


def serve(omni: Any, asks: list[Ask], title: str, every: int = ARRIVE_EVERY) -> tuple[Outputs, float]:
    """Run requests that arrive one by one, `every` engine steps apart; their outputs in order, and the seconds."""
    from tqdm import tqdm

    outputs: dict[str, Any] = {}
    ids = [f"{title}-{index}" for index in range(len(asks))]
    waiting = list(zip(ids, asks, strict=True))
    ticks = 0
    with tqdm(total=sum(a.steps for a in asks), desc=f"{title:>12}", unit="step", leave=True, mininterval=0.2) as bar:
        began = time.perf_counter()
        while len(outputs) < len(asks):
            if waiting and (ticks % every == 0 or not omni.engine.has_unfinished_requests()):
                omni.engine.add_request(_request(*waiting.pop(0)))
            for output in omni.engine.step():
                if output.error is not None:
                    raise output.error
                outputs[output.request_id] = output
            ticks += 1
            running = omni.engine.progress()
            done = [*outputs.values(), *running]
            bar.set_postfix(running=len(running), skipped=sum(o.skipped_steps for o in done), refresh=False)
            bar.update(sum(o.step for o in done) - bar.n)
        seconds = time.perf_counter() - began
    return [outputs[i] for i in ids], seconds


def _request(request_id: str, ask: Ask) -> Any:
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt

    params = OmniDiffusionSamplingParams(
        num_inference_steps=ask.steps, seed=ask.seed, output_type="np", cache=ask.cache
    )
    return OmniDiffusionRequest(request_id, ask.prompt, normalise_prompt(ask.prompt), params)


def rgb(output: Any) -> np.ndarray:
    """The picture as 8-bit RGB, rounded as diffusers does it."""
    return (output.images[0] * 255).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; identical pictures count as 99."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else min(99.0, float(10 * np.log10(255**2 / error)))


@dataclass
class Passes:
    """What the passes gave, request by request."""

    asks: list[Ask]
    uncached: Outputs
    cached: Outputs
    fewer: Outputs
    seconds_uncached: float
    seconds_cached: float
    isolation: list[float]

    def psnr_cached(self) -> list[float]:
        return [psnr(rgb(a), rgb(b)) for a, b in zip(self.uncached, self.cached, strict=True)]

    def psnr_fewer(self) -> list[float]:
        return [psnr(rgb(a), rgb(b)) for a, b in zip(self.uncached, self.fewer, strict=True)]


def run_passes(omni: Any, asks: list[Ask], repeats: int) -> Passes:
    """Warm up, time both passes in turn, then the control and each cached request alone."""
    off = [Ask(a.prompt, a.steps, a.seed, "off") for a in asks]
    serve(omni, [Ask(a.prompt, 4, a.seed, c) for a, c in zip(asks, ["off", None] * len(asks), strict=False)], "warm-up")
    seconds: dict[str, list[float]] = {"uncached": [], "cached": []}
    for _ in range(repeats):
        uncached, taken = serve(omni, off, "uncached")
        seconds["uncached"].append(taken)
        cached, taken = serve(omni, asks, "cached")
        seconds["cached"].append(taken)
    control = [Ask(a.prompt, c.computed_steps, a.seed, "off") for a, c in zip(asks, cached, strict=True)]
    fewer, _ = serve(omni, control, "fewer steps")
    alone, _ = serve(omni, asks, "alone", every=sys.maxsize)
    isolation = [float(np.abs(a.images[0] - b.images[0]).max()) for a, b in zip(alone, cached, strict=True)]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return Passes(asks, uncached, cached, fewer, medians["uncached"], medians["cached"], isolation)


def print_table(passes: Passes) -> None:
    """One line per request, and the means."""
    rows = [
        (ask.prompt, ask.steps, o.computed_steps, o.skipped_steps, f"{c:.1f}", f"{f:.1f}", f"{e:.1e}")
        for ask, o, c, f, e in zip(
            passes.asks, passes.cached, passes.psnr_cached(), passes.psnr_fewer(), passes.isolation, strict=True
        )
    ]
    heads = ("prompt", "steps", "computed", "skipped", "PSNR cached", "PSNR fewer steps", "batch vs alone")
    print("\n" + f"{heads[0]:<15}" + "".join(f"  {head:>{len(head)}}" for head in heads[1:]))
    for row in rows:
        cells = zip(heads[1:], row[1:], strict=True)
        print(f"{row[0]:<15}" + "".join(f"  {cell:>{len(head)}}" for head, cell in cells))
    print("\nPSNR in dB to the uncached picture, higher is nearer. Fewer steps: as many as computed, without cache.\n")


@cache
def font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def draw_grid(passes: Passes, path: Path) -> None:
    """Bands of up to six columns: uncached, cached, difference, and under each column its prompt and steps."""
    side = passes.uncached[0].images[0].shape[0] * ENLARGE
    left, gap, caption, band_gap = 150, 8, 46, 26
    columns = min(COLUMNS, len(passes.asks))
    bands = -(-len(passes.asks) // columns)
    band = 3 * (side + gap) + caption
    size = (left + columns * (side + gap) + gap, bands * band + (bands - 1) * band_gap + 2 * gap)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    labels = ("without\ncache", "with\nMagCache", f"difference\n× {AMPLIFY}")
    for b in range(bands):
        for r, label in enumerate(labels):
            middle = gap + b * (band + band_gap) + r * (side + gap) + side // 2
            draw.multiline_text((left // 2, middle), label, INK, font(18, True), anchor="mm", align="center")
    for i, (ask, a, c) in enumerate(zip(passes.asks, passes.uncached, passes.cached, strict=True)):
        x = left + i % columns * (side + gap)
        top = gap + i // columns * (band + band_gap)
        difference = np.clip(np.abs(rgb(a).astype(int) - rgb(c)) * AMPLIFY, 0, 255).astype(np.uint8)
        for r, picture in enumerate((rgb(a), rgb(c), difference)):
            big = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(big, (x, top + r * (side + gap)))
            corner = (x - 1, top + r * (side + gap) - 1, x + side, top + r * (side + gap) + side)
            draw.rectangle(corner, outline=EDGE)
        under = top + 3 * (side + gap)
        draw.text((x + side // 2, under), ask.prompt, INK, fitting(ask.prompt, side), anchor="ma")
        note = f"{ask.steps} steps, {c.computed_steps} computed"
        draw.text((x + side // 2, under + 24), note, INK, fitting(note, side, 14, False), anchor="ma")
    canvas.save(path)


def fitting(text: str, width: int, size: int = 17, bold: bool = True) -> Any:
    """The largest font, up to `size`, in which `text` is no wider than `width`."""
    return next((font(s, bold) for s in range(size, 6, -1) if font(s, bold).getlength(text) <= width), font(6, bold))


def draw_steps(passes: Passes, path: Path) -> None:
    """One row per request and one cell per step: filled where the blocks were computed, light where skipped."""
    cell, row, left, top, right = 18, 34, 170, 62, 205
    most = max(a.steps for a in passes.asks)
    width = max(left + most * cell + right, left + 580)  # the title and the legend need 580
    canvas = Image.new("RGB", (width, top + len(passes.asks) * row + 30), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 10), "Denoising steps with MagCache", INK, font(18, True))
    for x, colour, word in ((left + 360, FILLED, "computed"), (left + 480, LIGHT, "skipped")):
        draw.rectangle((x, 14, x + 14, 28), fill=colour, outline=EDGE)
        draw.text((x + 22, 21), word, INK, font(15), anchor="lm")
    for i, (ask, output) in enumerate(zip(passes.asks, passes.cached, strict=True)):
        y = top + i * row
        label = fitting(ask.prompt, left - 20, 16, False)
        draw.text((left - 14, y + row // 2 - 3), ask.prompt, INK, label, anchor="rm")
        plan = output.plan or (True,) * ask.steps
        for step, computed in enumerate(plan):
            corner = (left + step * cell, y, left + step * cell + cell - 3, y + row - 9)
            draw.rectangle(corner, fill=FILLED if computed else LIGHT, outline=FILLED if computed else EDGE)
        note = f"NFE {output.computed_steps} of {ask.steps}  ({ask.steps / output.computed_steps:.1f}×)"
        draw.text((left + ask.steps * cell + 10, y + row // 2 - 3), note, INK, font(15), anchor="lm")
    for step in [1, *range(5, most + 1, 5)]:
        x = left + (step - 1) * cell + cell // 2
        draw.text((x, top + len(passes.asks) * row + 2), str(step), INK, font(13), anchor="mt")
    canvas.save(path)


def summary(passes: Passes, grid: Path) -> dict[str, Any]:
    """The last line."""
    return {
        "images": len(passes.cached),
        "nfe_uncached": sum(o.computed_steps for o in passes.uncached),
        "nfe_cached": sum(o.computed_steps for o in passes.cached),
        "seconds_uncached": round(passes.seconds_uncached, 3),
        "seconds_cached": round(passes.seconds_cached, 3),
        "speedup": round(passes.seconds_uncached / passes.seconds_cached, 3),
        "psnr_cached_db": round(statistics.mean(passes.psnr_cached()), 2),
        "psnr_fewer_steps_db": round(statistics.mean(passes.psnr_fewer()), 2),
        "max_isolation_error": max(passes.isolation),
        "grid": str(grid),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tools/demo.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of the pictures (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="four prompts of 4 to 10 steps, timed once: a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first request; the next ones count on (0)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = QUICK if args.quick else STEPS_OF_PROMPTS
    asks = [Ask(prompt, steps, args.seed + i) for i, (prompt, steps) in enumerate(chosen.items())]

    from vllm_omni import Omni
    from vllm_omni.engine.malloc import keep_freed_memory

    keep_freed_memory()
    fewest, most = min(chosen.values()), max(chosen.values())
    print(f"Loading the model in the box, then drawing {len(asks)} prompts of {fewest} to {most} steps each way.")
    with Omni("demo", cache_backend="magcache", dtype="float32") as omni:
        passes = run_passes(omni, asks, repeats=1 if args.quick else 2)
    grid = args.out / "grid.png"
    draw_grid(passes, grid)
    draw_steps(passes, args.out / "steps.png")
    print_table(passes)
    print(f"Pictures: {grid}   Computed and skipped steps: {args.out / 'steps.png'}")
    print(json.dumps(summary(passes, grid)))


if __name__ == "__main__":
    main()
