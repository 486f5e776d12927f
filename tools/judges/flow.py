"""Rectified flow on latents of scenes that are drawn as they are needed; resumable, a function of the step alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .job import Job
from .latents import load_basis
from .networks import JUDGES, VAE_OF, Judge
from .scenes import DRAW, Batch

DROPPED = 0.12  # share of captions replaced by the empty one
DECAY = 0.999
DRAWN = 768  # scenes of a round; each is used REUSE times, under other noise
REUSE = 4
WARMUP = 100
COOLDOWN = 0.25  # last share of the steps, in which the learning rate falls to zero

attention = F.scaled_dot_product_attention


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **other: object,
) -> torch.Tensor:
    """Attention as two products and a softmax: on a CPU its backward is several times faster than the fused one's."""
    if is_causal or attn_mask is not None or dropout_p:
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    weights = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    return weights.softmax(-1).to(value.dtype) @ value


@dataclass
class Recipe:
    steps: int
    batch: int
    peak: float  # learning rate
    mean: float  # of the logit-normal noise level
    spread: float


RECIPES = {
    "images": Recipe(3000, 32, 2.5e-3, 0.3, 1.2),
    "video": Recipe(3000, 24, 2.5e-3, 0.4, 1.2),
    "joint": Recipe(3000, 32, 2.5e-3, 0.3, 1.2),
}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a plateau, and a straight line down."""
    return peak * max(0.0, min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps)))


class Stream:
    """Latents and captions of a step: round r of drawn scenes serves the steps of r, in an order of its own."""

    def __init__(self, name: str, work: Path, batch: int):
        self.name, self.basis, self.batch = name, load_basis(VAE_OF[name], work), batch
        self.per_round = DRAWN * REUSE // batch
        self.round = -1

    def __call__(self, step: int) -> tuple[torch.Tensor, list[str], torch.Generator]:
        number = step // self.per_round
        if number != self.round:
            drawn: Batch = DRAW[self.name](number, DRAWN)
            z = self.basis.encode(drawn.pixels)
            self.latents = z * self.basis.scale.view(-1, *[1] * (z.ndim - 2))
            self.captions, self.round = drawn.captions, number
            generator = torch.Generator().manual_seed(number)
            self.order = torch.cat([torch.randperm(DRAWN, generator=generator) for _ in range(REUSE)])
        start = step % self.per_round * self.batch
        index = self.order[start : start + self.batch]
        generator = torch.Generator().manual_seed(500_000_000 + step)
        kept = (torch.rand(len(index), generator=generator) >= DROPPED).tolist()
        texts = [self.captions[i] if keep else "" for i, keep in zip(index.tolist(), kept, strict=True)]
        return self.latents[index], texts, generator


class FlowJob(Job):
    """A judge in training, and the moving average of its weights that is exported."""

    def __init__(self, name: str, work: Path, steps: int | None = None, compiled: bool = False):
        torch.manual_seed(1)
        self.recipe = RECIPES[name]
        super().__init__(name, work / name / "flow.pt", steps or self.recipe.steps, self.recipe.batch)
        self.judge: Judge = JUDGES[name](work)
        self.ema = copy.deepcopy(self.judge).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.judge.parameters(), lr=self.recipe.peak, weight_decay=0.01, betas=(0.9, 0.98), fused=True
        )
        self.resume({"judge": self.judge, "ema": self.ema, "optimizer": self.optimizer})
        self.stream = Stream(name, work, self.batch)
        if compiled:
            for block in self.judge.blocks():
                block.compile()

    def train(self) -> float:
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.done, self.steps, self.recipe.peak)
        x0, texts, generator = self.stream(self.done)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(self.recipe.mean + self.recipe.spread * torch.randn(len(x0), generator=generator))
        x = torch.lerp(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.judge.velocity(x, sigma, texts)
        loss = F.mse_loss(velocity.float(), noise - x0)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.judge.parameters(), 1.0)
        self.optimizer.step()
        decay = min(DECAY, (self.done + 1) / (self.done + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.judge.parameters()), 1 - decay)
        return loss.item()
