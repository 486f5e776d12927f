"""A prompt in, an MP4 out: for a text-to-video model (Wan, HunyuanVideo, LTX, …)."""

import argparse
from pathlib import Path

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.outputs.media import save_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a diffusers folder, or a hub id")
    parser.add_argument("prompt")
    parser.add_argument("--size", default="832x480", help="WIDTHxHEIGHT (%(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="4k + 1 for most models (%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--cache-backend", default="magcache", help="none, or %(default)s where a curve is known")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the video (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    width, height = map(int, args.size.split("x"))
    parameters = OmniDiffusionSamplingParams(
        width=width, height=height, num_frames=args.frames, num_inference_steps=args.steps, seed=7
    )
    with Omni(args.model, cache_backend=args.cache_backend) as omni:
        output = omni.generate(args.prompt, parameters)[0]
    if output.error is not None:
        raise output.error
    file = args.out / "video.mp4"
    sound = output.audio[0] if output.audio else None
    save_video(output.videos[0], file, output.fps or 16, sound, output.audio_rate)
    print(f"{file}: {output.computed_steps} steps computed, {output.skipped_steps} skipped")


if __name__ == "__main__":
    main()
