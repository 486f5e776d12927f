"""MagCache on a plain diffusers pipeline, without the engine; disable() gives the untouched pipeline back."""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.model_folder import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the pictures (%(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pipeline = FluxPipeline.from_pretrained(resolve_model("demo"), dtype=torch.float32)

    def draw(name: str) -> None:
        arguments = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 50}
        picture = pipeline("hamburger", generator=torch.Generator().manual_seed(0), **arguments).images[0]
        picture.save(out / f"hamburger_{name}.png")

    draw("plain")
    backend = MagCacheBackend(DiffusionCacheConfig(mag_threshold=0.24, mag_max_skip_steps=5, mag_retention_ratio=0.1))
    backend.enable(pipeline)
    backend.refresh(pipeline, num_inference_steps=50)
    draw("magcache")
    print(f"{backend.last_request.computed_steps} steps computed, {backend.last_request.skipped_steps} skipped")
    backend.disable(pipeline)


if __name__ == "__main__":
    main()
