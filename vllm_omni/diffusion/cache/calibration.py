"""Measuring a checkpoint: computes every step of some prompts, and keeps what a profile needs.

gamma_t = mean over tokens of ||r_t|| / ||r_(t-1)|| in fp32 (arXiv 2506.09045); G[s, t] = <r_s, r_t> per element,
averaged over prompts and branches. Residuals wait on the CPU in fp32 until their request ends.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.cache.state import CacheState, Computed, Kept, Key
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels import ops
from vllm_omni.version import __version__


class Calibration:
    """Collects the finished requests of one schedule and turns them into a profile."""

    def __init__(self) -> None:
        self.sigmas: tuple[float, ...] | None = None
        self._ratios: dict[str, list[np.ndarray]] = {}
        self._grams: dict[str, list[np.ndarray]] = {}

    def state(self, steps: int, sigmas: tuple[float, ...]) -> RecordingState:
        """The state of a request that is measured."""
        return RecordingState(self, steps, sigmas)

    @property
    def requests(self) -> int:
        return max(map(len, self._ratios.values()), default=0)

    def add(
        self,
        branch: str,
        sigmas: tuple[float, ...],
        residuals: Sequence[torch.Tensor],
        norms: Sequence[torch.Tensor],
    ) -> None:
        """One branch of one finished request: `residuals` (rows, tokens, channels) of every step in order, and the
        `norms` (rows, tokens) of their tokens."""
        if self.sigmas is None:
            self.sigmas = sigmas
        elif len(self.sigmas) != len(sigmas) or not np.allclose(self.sigmas, sigmas, atol=1e-6):
            raise InvalidValueError("sigmas", sigmas[:3], "must be the same schedule in all prompts of a calibration")
        ratios = [1.0] + [(b / a.clamp_min(1e-12)).mean().item() for a, b in pairwise(norms)]
        flat = torch.stack([r.flatten() for r in residuals]).double()
        self._ratios.setdefault(branch, []).append(np.array(ratios))
        self._grams.setdefault(branch, []).append((flat @ flat.T / flat.shape[1]).numpy())

    def profile(self, name: str, transformer_class: str, fingerprint: str, **provenance: Any) -> CacheProfile:
        """The average over everything added; InvalidValueError where nothing was."""
        if self.sigmas is None:
            raise InvalidValueError("calibration", 0, "needs at least one finished prompt")
        branches = {b: tuple(np.mean(rows, axis=0).round(6).tolist()) for b, rows in self._ratios.items()}
        spread = {b: tuple(np.std(rows, axis=0).round(6).tolist()) for b, rows in self._ratios.items()}
        grams = {b: np.mean(matrices, axis=0) for b, matrices in self._grams.items()}
        every = np.concatenate([np.asarray(matrices) for matrices in self._grams.values()])
        error = every.std(axis=0) / np.sqrt(len(every))  # of the mean
        return CacheProfile(
            name=name,
            transformer_class=transformer_class,
            fingerprint=fingerprint,
            ratios=next(iter(branches.values())),
            sigmas=tuple(round(s, 6) for s in self.sigmas),
            gram=_rounded(every.mean(axis=0)),
            branches=branches,
            branch_grams={b: _rounded(gram) for b, gram in grams.items()} if len(grams) > 1 else {},
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
    """The state of a request that is measured: never skips, and keeps every residual."""

    def __init__(self, calibration: Calibration, steps: int, sigmas: tuple[float, ...]) -> None:
        super().__init__(settings={"backend": "magcache", "calibrate": True})
        self._calibration, self._steps, self._sigmas = calibration, steps, sigmas
        self._kept: dict[Key, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def wants(self, key: Key, step: int) -> bool:
        return True

    def prepare(self, key: Key, step: int, computed: Computed) -> Kept:
        if (ends := computed.ends()) is None:
            return Kept()
        residual, norm = ops.residual_norm(*ends, torch.float32)
        return Kept(residual.cpu(), {"norm": norm.cpu()})

    def commit(self, key: Key, step: int, kept: Kept | None) -> None:
        """Keep the step's residual; a branch that is complete goes into the calibration."""
        super().commit(key, step, kept)
        steps = self._kept.setdefault(key, {})
        if kept is not None and isinstance(kept.residual, torch.Tensor):
            steps[step] = kept.residual, kept.memory["norm"]
        if len(steps) == self._steps:
            residuals, norms = zip(*(steps[s] for s in range(self._steps)), strict=True)
            self._calibration.add(key[1], self._sigmas, residuals, norms)
            del self._kept[key]

    def drop(self) -> None:
        super().drop()
        self._kept.clear()
