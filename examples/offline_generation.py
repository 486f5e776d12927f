"""Prompts in, pictures out: the model in the box, with MagCache for every request."""

import argparse
from pathlib import Path

from vllm_omni import Omni, OmniDiffusionSamplingParams

PROMPTS = ["red apple", "penguin", "birthday cake"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the pictures (%(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with Omni("demo", cache_backend="magcache") as omni:
        outputs = omni.generate(PROMPTS, OmniDiffusionSamplingParams(num_inference_steps=28, seed=7))
    for output in outputs:
        if output.error is not None:
            raise output.error
        file = out / f"{output.prompt.replace(' ', '_')}.png"
        output.images[0].save(file)
        print(f"{file}: {output.computed_steps} steps computed, {output.skipped_steps} skipped")


if __name__ == "__main__":
    main()
