"""Requests that come and go on an event loop: progress of each step, and one that is aborted on the way."""

import argparse
import asyncio
from pathlib import Path

from vllm_omni import AsyncOmni, OmniDiffusionSamplingParams


async def draw(omni: AsyncOmni, prompt: str, steps: int, out: Path) -> None:
    """One request; leaving the loop early would abort it too."""
    parameters = OmniDiffusionSamplingParams(num_inference_steps=steps, seed=steps)
    async for output in omni.generate(prompt, parameters, request_id=prompt):
        if not output.finished:
            if output.step and output.step % 10 == 0:
                print(f"{prompt}: step {output.step} of {output.num_inference_steps}")
        elif output.error is not None:
            print(f"{prompt}: {output.error}")
        else:
            output.images[0].save(out / f"{prompt.replace(' ', '_')}.png")
            print(f"{prompt}: done, {output.computed_steps} computed, {output.skipped_steps} skipped")


async def run(out: Path) -> None:
    async with AsyncOmni("demo", cache_backend="magcache") as omni, asyncio.TaskGroup() as group:
        for prompt, steps in (("cat face", 28), ("guitar", 20), ("rainbow", 1000)):
            group.create_task(draw(omni, prompt, steps, out))
            await asyncio.sleep(0.2)
        await omni.abort("rainbow")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the pictures (%(default)s)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(run(folder))
