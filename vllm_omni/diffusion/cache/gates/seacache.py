"""SeaCache (arXiv 2602.18993): how the latents change at the frequencies that the noise level lets through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from vllm_omni.diffusion.cache.gates.gate import PREVIOUS, GateBackend, GateRule, Memory, comparable, relative_l1
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig
from vllm_omni.diffusion.cache.state import Signal
from vllm_omni.errors import InvalidValueError

# The dimension of channels where it is not the second: after the frames, or the last.
_CHANNELS = {"CogVideoXTransformer3DModel": 2, "ConsisIDTransformer3DModel": 2, "Kandinsky5Transformer3DModel": -1}


def sea_filter(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """x, of shape (rows, channels, *grid), through the Wiener-like filter of noise level sigma, in fp32.

    x_t = (1 - sigma) x_0 + sigma eps with spectrum S = |f|^-beta of x_0 (beta 2 for pictures, 3 for videos) gives
    G = S / ((1 - sigma)^2 S + sigma^2), scaled to mean 1. The lowest frequency stands for 0.
    """
    grid = x.shape[2:]
    axes = [torch.fft.fftfreq(n, device=x.device) for n in grid]
    squared = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(dim=0)
    frequency = squared.clamp_min(1 / max(grid) ** 2).sqrt()
    spectrum = frequency.pow(-(2 if len(grid) < 3 else 3))
    gain = spectrum / ((1 - sigma) ** 2 * spectrum + max(sigma, 1e-3) ** 2)
    dims = tuple(range(2, x.ndim))
    return torch.fft.ifftn(gain / gain.mean() * torch.fft.fftn(x.float(), dim=dims), dim=dims).real


def grid_of(tokens: int, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """How a call's packed latents (rows, tokens, channels) are laid out, by what it says itself."""
    for grid in _grids(arguments, tokens):
        if math.prod(grid) == tokens:
            return grid
    raise InvalidValueError("tokens", tokens, "of this model cannot be laid out as a picture; use another gate")


def _grids(arguments: Mapping[str, Any], tokens: int) -> list[tuple[int, ...]]:
    grids: list[tuple[int, ...]] = []
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(size, int) for size in sizes):
        grids.append(tuple(sizes))  # type: ignore[arg-type]
    if arguments.get("img_shapes"):
        shape = arguments["img_shapes"][0]
        frames, height, width = shape[0] if isinstance(shape, list) else shape
        grids.append((height, width) if frames == 1 else (frames, height, width))
    if (ids := arguments.get("img_ids")) is not None:
        image, *last = ids.reshape(-1, ids.shape[-1])[:tokens].amax(dim=0).tolist()[:3]
        grids += [tuple(int(place) + 1 for place in last)] * (image == 0)  # the first is a reference picture's number
    else:
        grids.append((int(tokens**0.5),) * 2)
    return grids


class SeaCacheRule(GateRule):
    """Sum of the relative L1 changes of the filtered latents."""

    name, signal, threshold = "seacache", Signal.LATENTS, 0.25

    def __init__(self, channels: int = 1) -> None:
        """`channels` is their dimension, of latents that are a picture or a clip."""
        self._channels = channels
        self._grids: dict[int, tuple[int, ...]] = {}  # by tokens: to find one may need a read of the device

    def describe(self, latents: torch.Tensor, arguments: Mapping[str, Any], sigma: float) -> torch.Tensor:
        if latents.ndim != 3:
            return sea_filter(latents.movedim(self._channels, 1), sigma)
        rows, tokens, channels = latents.shape
        if tokens not in self._grids:
            self._grids[tokens] = grid_of(tokens, arguments)
        return sea_filter(latents.transpose(1, 2).reshape(rows, channels, *self._grids[tokens]), sigma)

    def change(self, now: torch.Tensor, memory: Memory) -> torch.Tensor | None:
        return relative_l1(now, memory[PREVIOUS]) if comparable(memory, PREVIOUS, now) else None


class SeaCacheBackend(GateBackend):
    """SeaCache as a cache backend."""

    name, rule = "seacache", SeaCacheRule

    def make_rule(self, config: DiffusionCacheConfig) -> GateRule:
        classes = [denoiser.name for denoiser in self.denoisers.values()]
        return SeaCacheRule(next((_CHANNELS[name] for name in classes if name in _CHANNELS), 1))
