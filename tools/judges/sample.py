"""Sample a judge in training: Euler over shifted noise levels with two guidance branches, started anywhere."""

from __future__ import annotations

from pathlib import Path

import torch

from .networks import JUDGES, LATENTS, Judge

STEPS, SHIFT = 28, 3.0
GUIDANCE = {"images": 3.0, "video": 3.0, "joint": 3.0}


def load_judge(name: str, work: Path) -> tuple[Judge, int]:
    """The moving average of a judge's weights, and after how many steps."""
    state = torch.load(work / name / "flow.pt", weights_only=True, mmap=True)
    judge = JUDGES[name](work)
    judge.load_state_dict(state["ema"])
    return judge.eval().requires_grad_(False), state["step"]


def noise_levels(name: str, steps: int = STEPS, shift: float = SHIFT) -> torch.Tensor:
    """From 1 to 0, steps + 1 of them: the pipeline's, shifted as FlowMatchEulerDiscreteScheduler does it."""
    sigma = torch.linspace(1, 1 / (steps if name == "images" else 1000), steps)
    return torch.cat([shift * sigma / (1 + (shift - 1) * sigma), torch.zeros(1)])


def start_noise(name: str, seeds: list[int]) -> torch.Tensor:
    return torch.stack([torch.randn(LATENTS[name], generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.inference_mode()
def guided(judge: Judge, x: torch.Tensor, sigma: torch.Tensor, texts: list[str], scale: float) -> torch.Tensor:
    level = sigma.expand(2 * len(x))
    with_text, without = judge.velocity(torch.cat([x, x]), level, [*texts, *[""] * len(x)]).chunk(2)
    return without + scale * (with_text - without)


def finish(
    judge: Judge, x: torch.Tensor, texts: list[str], first: int = 0, steps: int = STEPS
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Latents at the end of a run from step `first`; those before each step; the velocity of each step."""
    sigma = noise_levels(judge.name, steps)
    points, velocities = [], []
    for step in range(first, steps):
        velocity = guided(judge, x, sigma[step], texts, GUIDANCE[judge.name])
        points.append(x)
        velocities.append(velocity)
        x = x + (sigma[step + 1] - sigma[step]) * velocity
    return x, points, velocities
