"""Measuring a checkpoint: computes every step of some prompts, and keeps what a profile needs.

gamma_t = mean over tokens of ||r_t|| / ||r_(t-1)|| in fp32 (arXiv 2506.09045); G[s, t] = <r_s, r_t> per element,
averaged over prompts and branches, and the same of the output that the scheduler gets.
A residual stays where it is made: of each step a sketch of a few thousand numbers
is kept, a fixed random projection under which inner products, and those of differences, hold to a few per cent
(Charikar, Chen and Farach-Colton 2002; the error is sqrt(2 / width)). So any request of any size can be measured.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.cache.plan.schedule import Schedule, Switches
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.state import CacheState, Computed, Kept, Key
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops
from vllm_omni.kernels.device import tried
from vllm_omni.version import __version__

SKETCH = 4093  # a prime: whatever a model's width, each of its channels falls into every place of the sketch
PIECES = 1024  # times as long as a sketch is what is signed at a time
SHIFT = 7919  # by which the signs of a piece are those of the one before: what shares a place has signs of its own


@lru_cache(maxsize=4)
def _signs(count: int, device: torch.device) -> torch.Tensor:
    """Random signs, the same on every device."""
    coins = torch.randint(2, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return (2 * coins - 1).to(device)


def sketch(residual: torch.Tensor, width: int = SKETCH) -> torch.Tensor:
    """A residual's elements with random signs, each added to the place that its index has modulo the width.

    In units of the root of their number, so that products of sketches are means over elements.
    """
    flat = residual.flatten()
    if len(flat) <= width:
        return flat / math.sqrt(len(flat))
    sketch, signs = flat.new_zeros(width), _signs(PIECES * width, flat.device)
    for place, part in enumerate(flat.split(len(signs))):  # signs of all of a video would be as large as it
        signed = part * (signs.roll(place * SHIFT) if place else signs)[: len(part)]
        whole = len(part) // width * width
        sketch += signed[:whole].view(-1, width).sum(dim=0)
        sketch[: len(part) - whole] += signed[whole:]
    return sketch / math.sqrt(len(flat))


class Calibration:
    """Collects the finished requests of one schedule and turns them into a profile."""

    def __init__(self, width: int = SKETCH) -> None:
        """`width` is how many numbers stand for a residual; one that is no longer is kept as it is."""
        self.width = width
        self.sigmas: tuple[float, ...] | None = None
        self.fruitless = 0  # finished requests that added nothing
        self.switches: Switches = ()
        self._ratios: dict[str, list[np.ndarray]] = {}
        self._grams: dict[str, list[np.ndarray]] = {}
        self._outputs: list[np.ndarray] = []

    def state(self, schedule: Schedule) -> RecordingState:
        """The state of a request that is measured."""
        self.switches = schedule.switches
        return RecordingState(self, schedule)

    @property
    def requests(self) -> int:
        """How many have been measured; of some, other branches than of the rest, if guidance is not in all."""
        return max(map(len, self._ratios.values()), default=0)

    def add(self, branch: str, sigmas: tuple[float, ...], ratios: Sequence[float], gram: np.ndarray) -> None:
        """One branch of one finished request: its curve, 1 first, and its matrix (steps, steps)."""
        if self.sigmas is None:
            self.sigmas = sigmas
        elif len(self.sigmas) != len(sigmas) or not np.allclose(self.sigmas, sigmas, atol=1e-6):
            raise InvalidValueError("sigmas", sigmas[:3], "must be the same schedule in all prompts of a calibration")
        self._ratios.setdefault(branch, []).append(np.array(ratios))
        self._grams.setdefault(branch, []).append(gram)

    def add_output(self, gram: np.ndarray) -> None:
        """The matrix (steps, steps) of one finished request's outputs, all branches joined."""
        self._outputs.append(gram)

    def profile(self, name: str, transformer_class: str, fingerprint: str, **provenance: Any) -> CacheProfile:
        """The average over everything added; InvalidValueError where nothing was."""
        if self.sigmas is None:
            raise InvalidValueError("calibration", 0, "needs at least one finished prompt")
        branches = {b: tuple(np.mean(rows, axis=0).round(6).tolist()) for b, rows in self._ratios.items()}
        spread = {b: tuple(np.std(rows, axis=0).round(6).tolist()) for b, rows in self._ratios.items()}
        every = np.concatenate([np.asarray(matrices) for matrices in self._grams.values()])
        error = every.std(axis=0) / np.sqrt(len(every))  # of the mean
        return CacheProfile(
            name=name,
            transformer_class=transformer_class,
            fingerprint=fingerprint,
            ratios=next(iter(branches.values())),
            sigmas=tuple(round(s, 6) for s in self.sigmas),
            gram=_rounded(every.mean(axis=0)),
            output_gram=_rounded(np.mean(self._outputs, axis=0)) if self._outputs else None,
            branches=branches,
            provenance={
                "kind": "calibrated",
                "prompts": self.requests,
                "steps": len(self.sigmas),
                "ratio_std": spread,
                "gram_relative_error": float(f"{np.linalg.norm(error) / np.linalg.norm(every.mean(axis=0)):.3g}"),
                "date": datetime.now(UTC).date().isoformat(),
                "versions": {
                    "vllm_omni": __version__,
                    "torch": torch.__version__,
                    "diffusers": version("diffusers"),
                    "python": platform.python_version(),
                },
                **provenance,
            },
        )


def _rounded(gram: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{v:.9g}") for v in row) for row in gram.tolist())


class RecordingState(CacheState):
    """The state of a request that is measured: never skips, and keeps a sketch of every residual."""

    def __init__(self, calibration: Calibration, schedule: Schedule) -> None:
        super().__init__(settings={"backend": "magcache", "calibrate": True})
        self._calibration, self._schedule = calibration, schedule
        self._sketches: dict[str, dict[int, torch.Tensor]] = {}  # by branch, whichever denoiser has the step
        self._ratios: dict[str, list[torch.Tensor]] = {}
        self._norms: dict[str, torch.Tensor] = {}  # of the last step's tokens
        self._outputs: dict[int, torch.Tensor] = {}
        self._whole = True  # what its denoisers return can be forecast
        self._added = self._over = False  # a branch is in the calibration; there was no room to go on

    def wants(self, key: Key, step: int) -> bool:
        return True

    def prepare(self, key: Key, step: int, computed: Computed) -> Kept:
        self._whole = self._whole and computed.is_of_rows
        kept, error = (None, None) if self._over else tried(partial(self._seen, computed))
        self._over = self._over or error is not None  # it is the measurement's, and no affair of the request's
        return kept or Kept()

    def _seen(self, computed: Computed) -> Kept:
        if (ends := computed.ends()) is None:
            return Kept()
        residual, norm = ops.residual_norm(*ends, torch.float32)
        return Kept(None, {"sketch": sketch(residual, self._calibration.width), "norm": norm})

    def commit(self, key: Key, step: int, kept: Kept | None) -> None:
        """Keep the step's sketch; a branch that is complete goes into the calibration, with its only device read."""
        super().commit(key, step, kept)
        if kept is None or not kept.memory:
            return
        branch = key[1]
        sketches, ratios = self._sketches.setdefault(branch, {}), self._ratios.setdefault(branch, [])
        before, norm = self._norms.get(branch), kept.memory["norm"]
        if before is not None and before.shape != norm.shape:  # another sequence now: its residuals do not compare
            self._norms[branch] = norm
            sketches.clear()
            return
        if step not in sketches and before is not None:
            ratios.append((norm / before.clamp_min(1e-12)).mean())
        sketches[step], self._norms[branch] = kept.memory["sketch"], norm
        if len(sketches) == self._schedule.steps:
            gram = self._gram(sketches)
            curve = [1.0, *(torch.stack(ratios).tolist() if ratios else ())]
            if bool(gram.isfinite().all()) and all(map(math.isfinite, curve)):
                self._calibration.add(branch, self._schedule.sigmas, curve, gram.cpu().numpy())
                self._added = True
            del self._sketches[branch], self._ratios[branch], self._norms[branch]

    def observe(self, step: int, model_output: Any, sample: Any) -> None:
        """Keep a sketch of the output; with the last step's the matrix is complete."""
        ended = step == self._schedule.steps - 1
        self._calibration.fruitless += ended and not (self._added or self._over)
        plain = isinstance(model_output, torch.Tensor) and model_output.dtype.is_floating_point
        if not plain or not self._whole or step in self._outputs:
            return
        _, error = tried(lambda: self._note_output(step, model_output))
        if error is not None:
            self._whole = False
            self._outputs.clear()

    def _note_output(self, step: int, model_output: torch.Tensor) -> None:
        self._outputs[step] = sketch(model_output.float(), self._calibration.width)
        if len(self._outputs) == self._schedule.steps:
            if self._added and bool((gram := self._gram(self._outputs)).isfinite().all()):
                self._calibration.add_output(gram.cpu().numpy())
            self._outputs.clear()

    def _gram(self, sketches: Mapping[int, torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack([sketches[step] for step in range(self._schedule.steps)]).double()
        return stacked @ stacked.T

    def drop(self) -> None:
        super().drop()
        self._over = self._over or self.computed_steps > 0  # what it has seen is lost
        for kept in (self._sketches, self._ratios, self._norms, self._outputs):
            kept.clear()
