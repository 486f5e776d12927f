"""How a family is really served: cached or not, several requests in a forward or one, and why; measured, not asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.modular_pipelines import ModularPipeline
from family import Family

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.outputs import OmniRequestOutput

MASK = [1, 1, 0, 1, 0, 1]
STEPS = (4, 6, 9, 6)


class Served(NamedTuple):
    """`cached`: steps were left out. `batched`: a forward had more than one request. `reason`: of what is not."""

    cached: bool
    batched: bool
    reason: str = ""

    def __str__(self) -> str:
        ways = {(1, 1): "cached and batched", (1, 0): "cached, alone", (0, 1): "batched", (0, 0): "alone"}
        return ways[self.cached, self.batched]


def flat(value: Any) -> torch.Tensor:
    """All numbers of an output, whatever holds them."""
    if isinstance(value, list | tuple):
        return torch.cat([flat(one) for one in value])
    return torch.as_tensor(np.asarray(value)).double().flatten()


def made(output: OmniRequestOutput) -> torch.Tensor:
    """All numbers of what a request brought."""
    assert output.error is None, output.error
    results = (output.latents, output.videos, output.images, output.audio)
    return flat(next(each for each in results if each is not None and len(each)))


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Numbers that are drawn without a request's generator, as JoyImage's encoding of the picture is, are the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def plain_of(family: Family, pipeline: Any, steps: int, scale: float = 3.0) -> torch.Tensor:
    """What plain diffusers makes of the first prompt."""
    arguments = {**family.settings, **family.prompt(0), **family.guided(scale), "num_inference_steps": steps}
    arguments["generator"] = torch.Generator("cpu").manual_seed(7)
    with drawn_alike():
        if isinstance(pipeline, ModularPipeline):  # it returns what it is asked for
            return flat(pipeline(**arguments, output="latents"))
        result = pipeline(**arguments, output_type=family.output)
    return flat(next(iter(result.values())))


def asked(family: Family, steps: int, seed: int, scale: float) -> Params:
    return Params(seed=seed, num_inference_steps=steps, output_type=family.output, **family.guided(scale))


class Serving:
    """An engine over a tiny pipeline whose steps follow `mask`, and its counters."""

    def __init__(self, family: Family, pipeline: Any, mask: list[int]) -> None:
        self.family, self.pipeline = family, pipeline
        self.omni = Omni.from_pipe(
            pipeline, cache_backend="magcache", cache_config={"steps_mask": mask}, defaults=family.settings
        )
        self.runner = self.omni.engine.worker.runner

    def generate(self, numbers: list[int], params: list[Params]) -> list[OmniRequestOutput]:
        with drawn_alike():
            return self.omni.generate([self.family.prompt(i) for i in numbers], params, use_tqdm=False)

    def alone_and_together(self) -> tuple[list[OmniRequestOutput], list[OmniRequestOutput], Served]:
        """Four requests one by one, then at once, and how they were served."""
        params = [asked(self.family, steps, i, 2.0 + i) for i, steps in enumerate(STEPS)]
        alone = [self.generate([i], [one])[0] for i, one in enumerate(params)]
        apart = sum(self.runner.forwards.values())
        together = self.generate(list(range(len(params))), params)
        batched = sum(self.runner.forwards.values()) - apart < apart
        cached = any(output.skipped_steps for output in alone)
        reasons = [reason for known in self.runner.denoisers.values() for reason in known.facts()["reasons"]]
        return alone, together, Served(cached, batched, self.family.why or (reasons[0] if reasons else ""))

    def first_blocks(self) -> list[torch.nn.Module]:
        """The first block of each stack that is known."""
        stacks = [known._stack for known in self.runner.denoisers.values() if known._stack is not None]
        return [stack.module.get_submodule(stack.spec.stack[0].name)[0] for stack in stacks]
