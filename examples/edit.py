"""A picture and a wish in, the picture changed: for a model that takes one (FLUX Kontext, Qwen-Image-Edit, …)."""

import argparse
from pathlib import Path

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.outputs.media import open_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a diffusers folder, or a hub id")
    parser.add_argument("picture", type=Path, help="PNG, JPEG or WebP")
    parser.add_argument("prompt", help="what to change")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--cache-backend", default="magcache", help="none, or %(default)s where a curve is known")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    picture = open_image(args.picture)
    prompt = {"prompt": args.prompt, "multi_modal_data": {"image": picture}}
    width, height = (side // 16 * 16 for side in picture.size)
    common = {"num_inference_steps": args.steps, "width": width, "height": height}
    seeds = [OmniDiffusionSamplingParams(seed=seed, **common) for seed in (1, 2)]
    with Omni(args.model, cache_backend=args.cache_backend) as omni:
        outputs = omni.generate([prompt, prompt], seeds)
    for output in outputs:
        if output.error is not None:
            raise output.error
        file = args.out / f"{args.picture.stem}_{output.seed}.png"
        output.images[0].save(file)
        print(f"{file}: {output.computed_steps} steps computed, {output.skipped_steps} skipped")


if __name__ == "__main__":
    main()
