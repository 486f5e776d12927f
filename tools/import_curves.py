"""Published magnitude curves to profile files: `python tools/import_curves.py mag_ratios.json`.

The input is a list of facts: per curve its values as published, their layout, and where they come from. Interleaved
lists are taken apart into branches; a leading 1 is added where the source leaves it out; what is doubtful gets no
checkpoint, so that it is only used by name; what measures another quantity, or no model of diffusers, is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.cache.profile import PROFILE_DIR, CacheProfile

# The checkpoint that a curve was measured on, by the id of its diffusers weights. One curve per checkpoint: of several,
# the one at the model's own defaults; the others are used by name.
CHECKPOINTS = {
    "flux1-dev-28": ["black-forest-labs/FLUX.1-dev"],
    "flux1-kontext-28": ["black-forest-labs/FLUX.1-Kontext-dev"],
    "chroma-26": ["lodestones/Chroma"],
    "qwen-image-50": ["Qwen/Qwen-Image"],
    "qwen-image-edit-50": ["Qwen/Qwen-Image-Edit"],
    "hunyuanvideo-720p-50": ["hunyuanvideo-community/HunyuanVideo", "tencent/HunyuanVideo"],
    "hunyuanvideo15-40": ["hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"],
    "hunyuanvideo15-i2v-480p-50-lightx2v": ["hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"],
    "wan21-t2v-1.3b-50": ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"],
    "wan21-t2v-14b-50": ["Wan-AI/Wan2.1-T2V-14B-Diffusers"],
    "wan21-i2v-480p-40": ["Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"],
    "wan21-i2v-720p-40": ["Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"],
    "wan21-vace-1.3b-50": ["Wan-AI/Wan2.1-VACE-1.3B-diffusers"],
    "wan21-vace-14b-50": ["Wan-AI/Wan2.1-VACE-14B-diffusers"],
    "wan22-t2v-a14b-40": ["Wan-AI/Wan2.2-T2V-A14B-Diffusers"],
    "wan22-i2v-a14b-40": ["Wan-AI/Wan2.2-I2V-A14B-Diffusers"],
    "wan22-ti2v-5b-t2v-50": ["Wan-AI/Wan2.2-TI2V-5B-Diffusers"],
    "framepack-25": ["lllyasviel/FramePackI2V_HY"],
    "framepack-f1-25": ["lllyasviel/FramePack_F1_I2V_HY_20250503"],
    "kandinsky5-lite-i2v-5s-sft-sd": ["kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers"],
    "kandinsky5-lite-t2i-sft-hd": ["kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers"],
    "kandinsky5-lite-t2v-5s-sft-sd": ["kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"],
    "kandinsky5-lite-t2v-10s-sft-sd": ["kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers"],
    "kandinsky5-lite-t2v-5s-nocfg-sd": ["kandinskylab/Kandinsky-5.0-T2V-Lite-nocfg-5s-Diffusers"],
    "kandinsky5-lite-t2v-10s-nocfg-sd": ["kandinskylab/Kandinsky-5.0-T2V-Lite-nocfg-10s-Diffusers"],
    "kandinsky5-pro-t2v-5s-sft-sd": ["kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers"],
    "kandinsky5-pro-t2v-10s-sft-sd": ["kandinskylab/Kandinsky-5.0-T2V-Pro-sft-10s-Diffusers"],
    "kandinsky5-pro-i2v-5s-sft-sd": ["kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"],
}
LEFT_OUT = {
    "flux1-dev-28-vllm-omni": "measures another quantity: no decay at the end, unlike the official curve",
    "flux2-28-vllm-omni": "made from raw block outputs, not from residuals",
    "omnigen2-20-comfy-community": "values from 0.41 to 5.7: the branches were mixed",
    "wan21-t2v-1.3b-50-eval": "45 of 50 steps, raised to a power by its source; the official curve is whole",
}
_TRUSTED = ("official", "model owner")


def curves(entry: dict[str, Any]) -> dict[str, list[float]]:
    """Per branch the ratios, 1 first. One unnamed branch where the model runs without a second pass."""
    leading = [] if entry["leading_ones"]["included_in_ratios"] else [1.0]
    if entry["cfg_layout"].startswith("interleaved"):
        branches = {"cond": leading + entry["ratios_cond"]}
        if entry["cfg_layout"] == "interleaved_cond_uncond":
            branches["uncond"] = leading + entry["ratios_uncond"]
        return branches
    return {"": leading + entry["ratios"]}


def profile(entry: dict[str, Any], branches: dict[str, list[float]]) -> CacheProfile:
    """`ratios` is the branches' geometric mean; the threshold rule looks at each branch."""
    steps = entry["steps"]
    wrong = {name: len(curve) for name, curve in branches.items() if len(curve) != steps}
    if wrong:
        raise ValueError(f"{entry['id']}: {steps} steps, but {wrong}")
    mean = [round(math.exp(sum(map(math.log, at)) / len(at)), 6) for at in zip(*branches.values(), strict=True)]
    source = entry["source"]
    told = ("steps", "scheduler", "resolution", "num_frames", "guidance", "notes")
    return CacheProfile(
        name=entry["id"],
        transformer_class=entry["transformer_class"].split(" ")[0],
        models=tuple(CHECKPOINTS.get(entry["id"], ())),
        ratios=tuple(mean),
        branches={name: tuple(curve) for name, curve in branches.items()} if len(branches) > 1 else {},
        provenance={
            "kind": "published",
            "trust": "official" if entry["provenance"].startswith(_TRUSTED) else "third party",
            "model": entry["model"],
            "source": ", ".join(f"{key} {value}" for key, value in source.items() if value),
            **{name: entry[name] for name in told if entry.get(name) is not None},
        },
    )


def main() -> int:
    """Write the profiles; print what was left out and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path, help="JSON file with an `entries` list")
    parser.add_argument("--out", type=Path, default=PROFILE_DIR)
    args = parser.parse_args()
    entries = {entry["id"]: entry for entry in json.loads(args.facts.read_text())["entries"]}
    written = 0
    for name, entry in entries.items():
        reason = LEFT_OUT.get(name)
        if entry["transformer_class"] is None:
            reason = reason or "no denoiser of diffusers"
        if reason is not None:
            print(f"left out {name}: {reason}")
            continue
        branches = curves(entry)
        if name.endswith("-uncond") and entry["cfg_layout"].startswith("separate_lists"):
            continue
        if entry["cfg_layout"] == "separate_lists_cond":
            other = entries[name.removesuffix("-cond") + "-uncond"]
            branches = {"cond": curves(entry)[""], "uncond": curves(other)[""]}
            entry = entry | {"id": name.removesuffix("-cond")}
        made = profile(entry, branches).model_dump(mode="json", exclude_defaults=True)
        (args.out / f"{entry['id']}.json").write_text(json.dumps(made, ensure_ascii=False) + "\n")
        written += 1
    print(f"{written} profiles written, {len(CHECKPOINTS)} of them for a checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
