"""Is a judge fair? It follows its captions, leaves them open, and its early errors grow. Uses the exported folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from .networks import FRAMES
from .sample import SHIFT, STEPS, finish, guided, load_judge, noise_levels, start_noise
from .scenes import COLOURS, COUNTS, DRAW, MOTIONS, PLACES, SHAPES, TONES, Batch

CLASSES = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "place": len(PLACES),
    "count": len(COUNTS),
    "tone": len(TONES),
    "motion": len(MOTIONS),
}
HELD_OUT = 900_000_000  # batches from here on are no training data


class Classifier(nn.Module):
    """Names the factors of a picture, or of a clip by three of its frames."""

    def __init__(self, channels: int, factors: list[str]):
        super().__init__()
        widths = [channels, 32, 64, 96]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        heads = {f: nn.Sequential(nn.Linear(1536, 64), nn.ReLU(), nn.Linear(64, CLASSES[f])) for f in factors}
        self.heads = nn.ModuleDict(heads)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if pixels.ndim == 5:
            pixels = pixels[:, :, [0, FRAMES // 2, FRAMES - 1]].flatten(1, 2)
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def train_classifier(name: str, work: Path, steps: int = 1000, batch: int = 64) -> tuple[Classifier, dict[str, float]]:
    """A classifier of scenes, and how often it is right on drawn scenes that it has not seen."""
    torch.manual_seed(2)
    file, factors = work / f"classifier-{name}.pt", list(DRAW[name](0, 1).factors)
    model = Classifier(9 if name == "video" else 3, factors)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in tqdm(range(steps), desc=f"classifier {name}", mininterval=10):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
            drawn = DRAW[name](50_000_000 + step, batch, complete=True)
            pixels = soften(drawn.pixels) if step % 4 == 0 else drawn.pixels
            pixels = pixels + 0.04 * torch.randn_like(pixels)
            out = model(pixels)
            loss = sum((F.cross_entropy(out[f], drawn.factors[f]) for f in factors), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save(model.state_dict(), file)
    model.eval()
    return model, follows(model, DRAW[name](HELD_OUT + 1, 512, complete=True))


def soften(pixels: torch.Tensor) -> torch.Tensor:
    flat = pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)
    out = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return out if pixels.ndim == 4 else out.view(len(pixels), -1, *out.shape[1:]).transpose(1, 2)


@torch.inference_mode()
def follows(model: Classifier, scenes: Batch) -> dict[str, float]:
    """Share of scenes in which each named factor, and all of them, are what the caption says."""
    out = model(scenes.pixels)
    right = {f: out[f].argmax(1) == want for f, want in scenes.factors.items()}
    right["all"] = torch.stack(list(right.values())).all(0)
    return {f: round(v.float().mean().item(), 4) for f, v in right.items()}


@torch.inference_mode()
def generate(target: Path, captions: list[str], seeds: list[int], euler: bool = False, batch: int = 16) -> torch.Tensor:
    """Through the ordinary pipeline with the folder's defaults; pixels in [-1, 1]."""
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    pipeline = DiffusionPipeline.from_pretrained(target, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if euler:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    arguments = json.loads((target / "generation_config.json").read_text())
    negative = arguments.pop("negative_prompt")
    parts = []
    for start in tqdm(range(0, len(captions), batch), desc=f"generate {target.name}", mininterval=10):
        part = captions[start : start + batch]
        out = pipeline(
            part,
            negative_prompt=[negative] * len(part),
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
            output_type="pt",
            **arguments,
        )
        parts.append(out.frames.transpose(1, 2) if hasattr(out, "frames") else out.images)
    return torch.cat(parts).float() * 2 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10(((a - b) / 2).pow(2).flatten(1).mean(1))


@torch.inference_mode()
def gains(name: str, work: Path, prompts: int = 8, size: float = 1e-3) -> list[float]:
    """Change at the end per change after each step, in the direction in which a reused velocity errs there."""
    judge, _ = load_judge(name, work)
    texts, sigma = DRAW[name](HELD_OUT + 2, prompts, complete=True).captions, noise_levels(name)
    end, points, velocities = finish(judge, start_noise(name, list(range(prompts))), texts)
    values = []
    for step in range(STEPS):
        before = velocities[step - 1] if step else guided(judge, points[0], sigma[1], texts, 1.0)
        direction = before - velocities[step]
        delta = size * direction / direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.ndim - 1))
        delta = delta * points[0][0].numel() ** 0.5
        after = points[step + 1] if step + 1 < STEPS else end
        moved = finish(judge, after + delta, texts, step + 1)[0]
        ratio = (moved - end).flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)
        values.append(round(ratio.pow(2).mean().sqrt().item(), 3))
    return values


def picture(pixels: torch.Tensor, columns: int) -> torch.Tensor:
    """Pictures side by side; of a clip, five frames side by side."""
    if pixels.ndim == 5:
        pixels = torch.cat(list(pixels[:, :, ::4].unbind(2)), 3)
    pixels = F.pad(pixels, (1, 1, 1, 1), value=1.0)
    return torch.cat([torch.cat(list(row), 2) for row in pixels.split(columns)], 1)


def save_sheet(pixels: torch.Tensor, columns: int, file: Path, zoom: int = 2) -> None:
    board = ((picture(pixels, columns).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(board))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file, optimize=True)


def evaluate(name: str, work: Path, target: Path, sheet: Path, count: int = 96) -> None:
    model, drawn = train_classifier(name, work)
    wanted = DRAW[name](HELD_OUT, count, complete=True)
    pixels = generate(target, wanted.captions, list(range(count)))
    pairs = count // 3
    other = generate(target, wanted.captions[:pairs], [10_000 + i for i in range(pairs)])
    columns = min(4 if name == "video" else 12, pairs // 2)
    shown = 2 * columns
    rows = [pixels[:columns], other[:columns], pixels[columns:shown], other[columns:shown]]
    save_sheet(torch.cat(rows), columns, sheet)
    result: dict[str, Any] = {
        "judge": name,
        "captions": wanted.captions[:shown],
        "classifier_on_drawn_scenes": drawn,
        "follows": follows(model, Batch(wanted.captions, pixels, wanted.factors)),
        "psnr_between_seeds": round(psnr(pixels[:pairs], other).mean().item(), 2),
        "gains": gains(name, work),
    }
    if name == "video":
        clips = generate(target, wanted.captions[:pairs], list(range(pairs)), euler=True)
        wanted = Batch([], clips, {f: v[:pairs] for f, v in wanted.factors.items()})
        result["follows_with_euler"] = follows(model, wanted)
    (work / f"evaluate-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "captions"}))
