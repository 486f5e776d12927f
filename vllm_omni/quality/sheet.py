"""The contact sheet: the uncached pictures, and under them each method's with its difference, amplified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vllm_omni.quality.bench import Result
from vllm_omni.quality.rows import GIVEN, PLANNED

AMPLIFY = 8
TIMES = 4.0  # without a setting of the user's: of every method, the one nearest to this speed-up
SIDE, LEFT, GAP = 128, 230, 6
INK, PAPER = "#1c2430", "#ffffff"


def chosen(results: Sequence[Result], steps: int) -> list[Result]:
    """All that the user gave, with what each other method takes for as much work; without any, one setting per method.

    Of ours the planned one, not its variants.
    """
    here = [r for r in results if r.row.steps == steps and not r.row.group.startswith(f"{PLANNED},")]
    given = [r for r in here if r.row.group == GIVEN]
    groups = dict.fromkeys(r.row.group for r in here if r.row.group != GIVEN)

    def nearest(group: str, times: float) -> Result:
        own = (r for r in here if r.row.group == group)
        return min(own, key=lambda r: float(abs(np.log(r.times_ideal / times))))

    compared = [nearest(group, times) for times in [r.times_ideal for r in given] or [TIMES] for group in groups]
    return [*given, *{result.row.name: result for result in compared}.values()]


def draw(results: Sequence[Result], reference: Path, file: Path) -> None:
    """Write the sheet as a PNG; one column per pair."""
    exact = _frames(np.load(reference))
    columns = len(exact)
    height = GAP + (1 + 2 * len(results)) * (SIDE + GAP)
    canvas = Image.new("RGB", (LEFT + columns * (SIDE + GAP), height), PAPER)
    draw_on = ImageDraw.Draw(canvas)
    _strip(canvas, draw_on, 0, "uncached", exact)
    for number, result in enumerate(results):
        pictures = _frames(np.load(result.sheet))
        row = result.row
        label = f"{row.name}\n{result.work:.1f} of {row.steps} forwards' work\n{np.mean(result.metrics['psnr']):.1f} dB"
        _strip(canvas, draw_on, 1 + 2 * number, label, pictures)
        difference = np.clip(np.abs(pictures - exact) * AMPLIFY, 0, 1)
        _strip(canvas, draw_on, 2 + 2 * number, f"difference × {AMPLIFY}", difference)
    canvas.save(file)


def _strip(canvas: Image.Image, draw_on: Any, line: int, label: str, pictures: np.ndarray) -> None:
    top = GAP + line * (SIDE + GAP)
    font = _font()
    words = "\n".join(_wrapped(part, font) for part in label.split("\n"))
    draw_on.multiline_text((LEFT - 10, top + SIDE // 2), words, INK, font, anchor="rm", align="right")
    for column, picture in enumerate(pictures):
        small = Image.fromarray((picture * 255).round().astype(np.uint8))
        small.thumbnail((SIDE, SIDE)) if small.width > SIDE else None
        fitted = small if small.width == SIDE else small.resize((SIDE, SIDE * small.height // small.width))
        canvas.paste(fitted.crop((0, 0, SIDE, SIDE)), (LEFT + column * (SIDE + GAP), top))


def _wrapped(text: str, font: Any) -> str:
    """Lines no wider than the margin."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > LEFT - 20:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _frames(pictures: np.ndarray) -> np.ndarray:
    """(pairs, height, width, 3); of a video its middle frame."""
    pictures = pictures.astype(np.float32)
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures


def _font() -> Any:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 14)
