"""Which prompts and seeds a report draws. Held out: no caption and no seed here may serve calibration.

The captions in a model's folder are split by their place in its `captions.txt`: even ones (0, 2, ...) are for
calibration, odd ones for reports. This module owns the split and the seeds; calibration's stay below `HELD_OUT_SEED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import check_text
from vllm_omni.model_folder import captions

HELD_OUT_SEED = 900_000
TUNING_SEED = 990_000  # peers' thresholds are chosen on these, by speed alone


@dataclass(frozen=True)
class Pair:
    """One picture to draw."""

    prompt: str
    seed: int


def own_captions(model: str, calibration: bool) -> list[str]:
    """The captions in a model's folder, for calibration (even ones) or for reports (odd ones)."""
    if not (lines := captions(model)):
        raise InvalidValueError("--prompts", None, f"must be given: no captions come with {model!r}; one prompt a line")
    return lines[0 if calibration else 1 :: 2]


def held_out(model: str, count: int, prompts: Path | None = None, seed: int = HELD_OUT_SEED) -> list[Pair]:
    """`count` pairs, evenly spread over the prompts; with more pairs than prompts they come again with other seeds."""
    if count < 1:
        raise InvalidValueError("--pairs", count, "must be at least 1")
    lines = read_prompts(prompts) if prompts is not None else own_captions(model, calibration=False)
    places = [i * len(lines) // count if count <= len(lines) else i % len(lines) for i in range(count)]
    return [Pair(lines[place], seed + i) for i, place in enumerate(places)]


def tuning(pairs: list[Pair], count: int) -> list[Pair]:
    """Pairs to find thresholds with: the same prompts, other seeds."""
    return [Pair(pair.prompt, TUNING_SEED + i) for i, pair in enumerate(pairs[-count:])]


def read_prompts(file: Path) -> list[str]:
    """The file's lines, one prompt a line; the file may be a pipe, such as /dev/stdin."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors put a mark in front
    except OSError as error:
        fix = f"must be a text file with one prompt a line ({error.strerror})"
        raise InvalidValueError("--prompts", str(file), fix) from None
    except UnicodeDecodeError:
        raise InvalidValueError("--prompts", str(file), "must be a text file in UTF-8") from None
    lines = [check_text("--prompts", line.strip()) for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidValueError("--prompts", str(file), "must hold at least one prompt")
    return lines
