"""Train the judges: three small models on endless procedural scenes.

Stages, each resumable: `train` (decoders, and rectified flow of transformer and text encoders together; all take
turns), `export` (ordinary diffusers folders) and `evaluate`.

    python tools/train_judges.py train export evaluate --work build/judges
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from judges.evaluate import evaluate
from judges.export import export
from judges.flow import RECIPES, FlowJob, plain_attention
from judges.job import Job
from judges.vae import STEPS, DecoderJob

REPO = Path(__file__).resolve().parent.parent
TARGETS = {
    "images": REPO / "benchmarks" / "judges" / "images",
    "joint": REPO / "benchmarks" / "judges" / "joint",
    "video": REPO / "vllm_omni" / "assets" / "demo-video",
}
PARTS = ("vae-picture", *RECIPES, "vae-clip")


def open_job(part: str, args: argparse.Namespace) -> Job:
    if part.startswith("vae-"):
        return DecoderJob(part.removeprefix("vae-"), args.work)
    return FlowJob(part, args.work, args.steps, args.compile)


def share_done(part: str, args: argparse.Namespace) -> float:
    file = args.work / (f"{part}.pt" if part.startswith("vae-") else f"{part}/flow.pt")
    if not file.exists():
        return 0.0
    steps = STEPS[part.removeprefix("vae-")] if part.startswith("vae-") else args.steps or RECIPES[part].steps
    return torch.load(file, weights_only=True, mmap=True)["step"] / steps


def train(args: argparse.Namespace) -> None:
    """Turns of so many minutes, of what is furthest behind, until all is done or the process is asked to end."""
    F.scaled_dot_product_attention = plain_attention
    ended: list[bool] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ended.append(True))
    deadline = time.monotonic() + 60 * args.minutes
    jobs: dict[str, Job] = {}  # kept, with what they have compiled
    while not ended and time.monotonic() < deadline:
        share, part = min((share_done(part, args), part) for part in args.parts)
        if share >= 1:
            break
        if part not in jobs:
            jobs[part] = open_job(part, args)
        jobs[part].run(min(60 * args.turn, deadline - time.monotonic()), lambda: bool(ended))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["train", "export", "evaluate"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of all these")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "judges", help="checkpoints")
    parser.add_argument("--steps", type=int, help="of flow, for every judge; the recipes' otherwise")
    parser.add_argument("--turn", type=float, default=20, help="minutes until the next part's turn")
    parser.add_argument("--minutes", type=float, default=1e6, help="of training in all")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: twice the speed after a minute")
    parser.add_argument("--target", type=Path, help="folder of the exported folders; their places here otherwise")
    parser.add_argument("--sheets", type=Path, default=REPO / "docs" / "images", help="where the samples go")
    parser.add_argument("--count", type=int, default=96, help="captions to evaluate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if "train" in args.stages:
        train(args)
    for name in [part for part in args.parts if part in RECIPES]:
        target = (args.target or TARGETS[name].parent) / TARGETS[name].name
        if "export" in args.stages:
            export(name, args.work, target)
        if "evaluate" in args.stages:
            evaluate(name, args.work, target, args.sheets / f"judge_{name}.png", args.count)


if __name__ == "__main__":
    main()
