"""Write the judges as ordinary diffusers folders, in bfloat16, with the defaults of their calls."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from .networks import FRAMES, SIDE, TEXT_TOKENS, VAE_OF, Judge
from .sample import GUIDANCE, SHIFT, STEPS, load_judge
from .scenes import COLOURS, COUNTS, MOTIONS, PLACES, PLURALS, SHAPES, TONES, named
from .vae import load_vae

NOTICE = """\
Trained by tools/train_judges.py on pictures that the same script draws; no data of others. Weights: Apache License 2.0.
"""


def captions(name: str) -> list[str]:
    """Every complete caption, shuffled: every other line is for calibration, the rest for reports."""
    if name == "images":
        every = [f"{named(c, s)} {p}" for p in PLACES for s in SHAPES for c in COLOURS]
    elif name == "video":
        every = [f"{named(c, s)} {m}" for m in MOTIONS for s in SHAPES for c in COLOURS]
    else:
        every = [
            f"{count} {c} {PLURALS[k] if count != 'one' else SHAPES[k]} on a {t} background"
            for t in TONES
            for count in COUNTS
            for k in range(len(SHAPES))
            for c in COLOURS
        ]
    random.Random(0).shuffle(every)
    return every


def pipeline_of(judge: Judge, work: Path) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        StableDiffusion3Pipeline,
        UniPCMultistepScheduler,
        WanPipeline,
    )

    vae, euler = load_vae(VAE_OF[judge.name], work), FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if judge.name == "video":
        unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
        return WanPipeline(judge.t5_tokenizer, judge.text_encoder, vae, unipc, judge.transformer)
    shared = {"scheduler": euler, "vae": vae, "transformer": judge.transformer}
    shared |= {"text_encoder": judge.text_encoder, "tokenizer": judge.clip_tokenizer}
    shared |= {"text_encoder_2": judge.text_encoder_2}
    if judge.name == "images":
        return FluxPipeline(**shared, tokenizer_2=judge.t5_tokenizer)
    third = {"text_encoder_3": judge.text_encoder_3, "tokenizer_3": judge.t5_tokenizer}
    return StableDiffusion3Pipeline(**shared, tokenizer_2=judge.clip_tokenizer, **third)


def defaults(name: str) -> dict[str, Any]:
    values: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS}
    values |= {"num_frames": FRAMES} if name == "video" else {}
    scale = "true_cfg_scale" if name == "images" else "guidance_scale"
    return values | {"negative_prompt": "", scale: GUIDANCE[name], "max_sequence_length": TEXT_TOKENS}


def export(name: str, work: Path, target: Path) -> None:
    judge, steps = load_judge(name, work)
    pipeline = pipeline_of(judge, work).to(torch.bfloat16)
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target, safe_serialization=True)
    (target / "generation_config.json").write_text(json.dumps(defaults(name), indent=2) + "\n")
    (target / "captions.txt").write_text("\n".join(captions(name)) + "\n")
    (target / "NOTICE").write_text(NOTICE)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {size / 1e6:.1f} MB after {steps} steps")
