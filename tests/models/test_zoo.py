"""Every pipeline of the installed diffusers that has a transformer: what plain diffusers makes, the engine makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from family import Family
from lanes import lane
from zoo import NOT_COVERED, ZOO, covered, transformer_classes

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params

STEPS = 4
RELATIVE = 1e-5  # of the largest number, in float32
# A picture from a text alone, an edit, a video in chunks, latents in sections, sound alone, a clip with sound.
FAST = {"Krea 2", "Ideogram 4", "JoyImage-Edit-Plus", "SkyReels V2 diffusion forcing", "FramePack", "Stable Audio", "LTX-2"}


def flat(value: Any) -> torch.Tensor:
    """All numbers of an output, whatever holds them."""
    if isinstance(value, list | tuple):
        return torch.cat([flat(one) for one in value])
    return torch.as_tensor(np.asarray(value)).double().flatten()


def plain_of(family: Family, pipeline: Any) -> torch.Tensor:
    arguments = {**family.settings, **family.prompt(0), **family.guided(3.0), "num_inference_steps": STEPS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # JoyImage's encoding of the picture does not take the generator
        made = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(7), output_type=family.output)
    return flat(next(iter(made.values())))


@pytest.mark.parametrize("family", lane(ZOO, lambda family: family.name in FAST), ids=lambda family: family.name)
def test_the_engine_makes_what_diffusers_makes(family: Family) -> None:
    pipeline = family.build()
    plain = plain_of(family, pipeline)
    assert plain.isfinite().all() and plain.abs().max() > 0
    params = Params(seed=7, num_inference_steps=STEPS, output_type=family.output, **family.guided(3.0))
    with Omni.from_pipe(pipeline, defaults=family.settings) as omni:
        (output,) = omni.generate([family.prompt(0)], params, use_tqdm=False)
        assert output.error is None, output.error
        made = next(each for each in (output.latents, output.videos, output.images, output.audio) if each is not None and len(each))
        assert omni.engine.worker.cache_bytes == 0
    made = flat(made)
    assert made.shape == plain.shape
    assert (made - plain).abs().max() <= RELATIVE * plain.abs().max()
    assert torch.equal(plain_of(family, pipeline), plain)  # and leaves the pipeline as it was


@pytest.mark.slow
def test_every_class_is_covered_or_named() -> None:
    classes, tested = set(transformer_classes()), set(covered())
    assert len(classes) >= 75
    missing = classes - tested - set(NOT_COVERED)
    assert not missing, f"no family has {sorted(missing)}: make a tiny pipeline, or say in NOT_COVERED why not"
    assert not set(NOT_COVERED) - classes and not set(NOT_COVERED) & tested
