"""Families on the fake device against the CPU, with and without cache; and who makes the host wait.

Their latents are compared exactly: the kernels are the CPU's, so whatever differs was computed from something else.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES, Family

import fake_cuda
from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.forward import look
from vllm_omni.diffusion.worker import runner
from vllm_omni.outputs import OmniRequestOutput

MASK = [1, 1, 0, 1, 0, 1]
CORE = ("FLUX.1", "Wan 2.2 (two experts)", "Z-Image", "Qwen-Image-Edit")
CACHE = {"steps_mask": MASK, "predictor": "linear"}
OTHERS = [pytest.param(f, id=f.name, marks=pytest.mark.slow) for f in FAMILIES if f.name not in CORE]
EVERY = [*(pytest.param(f, id=f.name) for f in FAMILIES if f.name in CORE), *OTHERS]


def served(family: Family, where: str, steps: int = 6, cache: Any = CACHE, n: int = 3) -> list[OmniRequestOutput]:
    """A joint run of `n` requests, whose prompts are on the CPU, as they are when they come over a socket."""
    pipeline = family.build().to(where)
    asked = [Params(num_inference_steps=steps, seed=i, output_type="latent", **family.guided(3.0)) for i in range(n)]
    given = {"cache_backend": "magcache", "cache_config": cache} if cache is not None else {}
    with Omni.from_pipe(pipeline, defaults=family.settings, **given) as omni:
        return omni.generate([family.prompt(i) for i in range(n)], asked, use_tqdm=False)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("cache", [CACHE, None], ids=["cache", "plain"])
def test_a_family_makes_on_the_device_what_it_makes_on_the_cpu(family: Family, cache: Any) -> None:
    there, here = served(family, "cuda", cache=cache), served(family, "cpu", cache=cache)
    for one, other in zip(there, here, strict=True):
        assert one.error is None and other.error is None, (one.error, other.error)
        assert one.latents.is_cuda and (one.computed_steps, one.skipped_steps) == (
            other.computed_steps, other.skipped_steps
        )  # fmt: skip
        assert torch.allclose(one.latents.cpu(), other.latents, rtol=1e-3, atol=1e-3)


def waits_per_step(family: Family, n: int = 3) -> Counter[fake_cuda.Wait]:
    """Waits of the host that come with every step, from two runs of which one has twice the steps."""
    counts = []
    for times in (1, 2):
        with fake_cuda.device.watched() as waits:
            outputs = served(family, "cuda", 6 * times, {"steps_mask": MASK * times, "predictor": "linear"}, n)
        assert all(output.error is None for output in outputs)
        counts.append(Counter(wait._replace(nbytes=0) for wait in waits))
    return counts[1] - counts[0]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", EVERY)
def test_no_planned_step_waits_for_the_device_on_our_account(family: Family) -> None:
    more = waits_per_step(family)
    print(f"{family.name}: {sum(more.values()) / 6:.1f} waits per step of three requests")
    for wait, count in more.most_common(6):
        print(f"  {count / 6:5.1f}  {wait.why}, {wait.operation}: {' < '.join(wait.callers)}")
    assert not [wait for wait in more if wait.ours]


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("gate", ["easycache", "fbcache", "seacache"])
def test_a_gated_batch_waits_once(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all of its requests, in every step in which it looks, and a picture need not be square."""
    looks: list[int] = []
    monkeypatch.setattr(runner, "look", lambda batch, *given: (looks.append(len(batch)), look(batch, *given)))
    family = FAMILIES[0]
    pipeline = family.build().to("cuda")
    n, shape = 3, {"height": 64, "width": 96, "output_type": "latent"}
    others = []
    with Omni.from_pipe(pipeline, cache_backend=gate, defaults=family.settings) as omni:
        for steps in (8, 16):
            asked = [Params(num_inference_steps=steps, seed=i, **shape) for i in range(n)]
            looks.clear()
            with fake_cuda.device.watched() as waits:
                outputs = omni.generate([family.prompt(i) for i in range(n)], asked, use_tqdm=False)
            assert all(output.error is None for output in outputs)
            ours = [wait for wait in waits if wait.ours]
            read = sum(wait.callers[0].startswith("vllm_omni/diffusion/cache/forward.py") for wait in ours)
            assert 0 < read <= len(looks) < sum(looks)
            others.append(len(ours) - read)
    assert others[0] == others[1]  # those are once per request, however many steps it has
