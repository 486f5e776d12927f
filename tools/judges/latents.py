"""The judges' latents: a linear projection of pixel patches, fitted once, and exactly what the encoders compute.

Pictures: the principal components of 4 × 4 patches. Clips: of 4 × 4 patches over the frame, or the four frames, that a
latent frame stands for: the mean at full resolution and two Haar differences over time at half of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .scenes import DRAW

CHANNELS = {"picture": 8, "clip": 16}
WHITENING = 0.7  # a component of standard deviation s is divided by s ** WHITENING


def to_depth(x: torch.Tensor, side: int) -> torch.Tensor:
    """(n, c, h, w) to (n, c · side², h / side, w / side)."""
    return F.pixel_unshuffle(x, side)


def features(pixels: torch.Tensor) -> torch.Tensor:
    """What the projection is applied to: (n, 48, h, w) of pictures, (n, 72, frames, h, w) of clips."""
    if pixels.ndim == 4:
        return to_depth(pixels, 4)
    _n, _, frames, _height, _width = pixels.shape
    out = []
    for first in [0, *range(1, frames, 4)]:
        a, b, c, d = pixels[:, :, first : first + 4].unbind(2) if first else [pixels[:, :, 0]] * 4
        within, across = (a - b + c - d) / 4, (a + b - c - d) / 4
        parts = [to_depth((a + b + c + d) / 4, 4), *(to_depth(F.avg_pool2d(v, 2), 2) for v in (within, across))]
        out.append(torch.cat(parts, 1))
    return torch.stack(out, 2)


@dataclass
class Basis:
    mean: torch.Tensor  # (features)
    weight: torch.Tensor  # (channels, features)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the decoder learns from: components of similar size."""
        x = features(pixels).movedim(1, -1) - self.mean
        return (x @ self.weight.T).movedim(-1, 1).contiguous()

    @property
    def scale(self) -> torch.Tensor:
        """From those to what the flow learns: (channels) factors that make large components larger, so that a picture
        is settled from coarse to fine. A component's size follows from the norm of its row."""
        size = self.weight.norm(dim=1) ** -((1 - WHITENING) / WHITENING)
        return 0.45 * size.sqrt() / size.pow(3).mean().sqrt()


def draw_pixels(kind: str, number: int, n: int) -> torch.Tensor:
    if kind == "clip":
        return DRAW["video"](number, n, rich=True).pixels
    return torch.cat([DRAW[name](number, n // 2, rich=True, size=64).pixels for name in ("images", "joint")])


def load_basis(kind: str, work: Path) -> Basis:
    file = work / f"basis-{kind}.safetensors"
    if not file.exists():
        x = features(draw_pixels(kind, 30_000_000, 512 if kind == "clip" else 2048)).movedim(1, -1).flatten(0, -2)
        mean = x.mean(0)
        variance, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        top = slice(-CHANNELS[kind], None)
        print(f"{kind}: the projection keeps {variance[top].sum() / variance.sum():.4f} of the variance")
        weight = vectors[:, top].T * variance[top, None] ** (-WHITENING / 2)
        spread = ((x - mean) @ weight.T).pow(2).mean().sqrt()
        save_file({"mean": mean, "weight": (weight / spread).flip(0).contiguous()}, file)
    return Basis(**load_file(file))
