"""Every pipeline of the installed diffusers that has a transformer: what plain diffusers makes, the engine makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family import Family
from lanes import lane
from serving import MASK, Serving, asked, drawn_alike, made, plain_of
from zoo import NOT_COVERED, ZOO, covered, transformer_classes
from zoo_states import STATES

from vllm_omni import Omni
from vllm_omni.learning import REQUESTS

STEPS = 6
RELATIVE = 1e-5  # of the largest number, in float32
# From a text alone, an edit, experts, a video in chunks, latents in sections, sound alone, a clip with sound.
FAST = {"Krea 2", "Ideogram 4", "JoyImage-Edit-Plus", "Nucleus-Image", "Helios", "FramePack", "Stable Audio", "LTX-2"}
LONG = {"Sana World Model"}
CASES = lane(ZOO, lambda f: f.name in FAST, lambda f: f.name in LONG)
families = pytest.mark.parametrize("family", CASES, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))


@pytest.mark.slow
@families
def test_the_engine_makes_what_diffusers_makes(family: Family) -> None:
    """Uncached; then with a cache that leaves nothing out, bit by bit; and the pipeline stays as it was."""
    pipeline = family.build()
    plain = plain_of(family, pipeline, STEPS)
    assert plain.isfinite().all() and plain.abs().max() > 0
    with Omni.from_pipe(pipeline, defaults=family.settings) as omni, drawn_alike():
        (output,) = omni.generate([family.prompt(0)], asked(family, STEPS, 7, 3.0), use_tqdm=False)
        assert omni.engine.worker.cache_bytes == 0
    assert made(output).shape == plain.shape
    assert (made(output) - plain).abs().max() <= RELATIVE * plain.abs().max()
    serving = Serving(family, pipeline, [1] * STEPS)
    for _ in range(2):  # the first of its kind is examined
        (cached,) = serving.generate([0], [asked(family, STEPS, 7, 3.0)])
        assert torch.equal(made(cached), made(output)) and cached.skipped_steps == 0
    serving.omni.close()
    assert torch.equal(plain_of(family, pipeline, STEPS), plain)


@pytest.mark.slow
@families
def test_a_family_is_served_as_listed(family: Family) -> None:
    """Blocks run as planned, a mixed batch equals each request alone, and nothing stays held."""
    pipeline = family.build()
    plain = plain_of(family, pipeline, STEPS)
    serving = Serving(family, pipeline, MASK)
    alone, together, served = serving.alone_and_together()
    listed = STATES[family.name]
    assert (served.cached, served.batched) == (listed.cached, listed.batched), f"{family.name} is served {served!r}"
    assert bool(listed.reason) is not (served.cached and served.batched) and (served.reason or not listed.reason)
    for one, mixed in zip(alone, together, strict=True):
        bound = max(RELATIVE, family.roundings * torch.finfo(torch.float32).eps)  # its own, where roundings grow
        assert (made(mixed) - made(one)).abs().max() <= bound * made(one).abs().max()
        assert (mixed.skipped_steps, mixed.plan) == (one.skipped_steps, one.plan)
    assert serving.omni.engine.worker.cache_bytes == 0
    counts, serving.runner.joins = [0], False  # as diffusers calls it
    for block in serving.first_blocks() if served.cached else []:
        block.register_forward_hook(lambda *_: counts.append(counts.pop() + 1))
    if served.cached:
        full, planned = counts[0], serving.generate([1], [asked(family, STEPS, 1, 3.0)])[0]
        with_cache, counts[0] = counts[0] - full, 0
    serving.omni.close()
    assert torch.equal(plain_of(family, pipeline, STEPS), plain)
    if served.cached:
        steps = planned.computed_steps + planned.skipped_steps  # of all runs that an output takes
        each, besides = divmod(counts[0], steps)  # AnyFlow keeps a chunk by a call of its own
        assert planned.skipped_steps > 0 and with_cache == each * planned.computed_steps + besides


@pytest.mark.slow
def test_every_class_is_covered_or_named() -> None:
    classes, tested = set(transformer_classes()), set(covered())
    assert len(classes) >= 75
    missing = classes - tested - set(NOT_COVERED)
    assert not missing, f"no family has {sorted(missing)}: make a tiny pipeline, or say in NOT_COVERED why not"
    assert not set(NOT_COVERED) - classes and not set(NOT_COVERED) & tested


@pytest.mark.parametrize("name", ["Krea 2", "Sana Video", "Nucleus-Image"])
def test_a_class_without_an_entry_and_without_a_curve_is_cached_after_a_few_requests(name: str) -> None:
    family = next(one for one in ZOO if one.name == name)
    config = {"calibrate": "auto"}
    with Omni.from_pipe(
        family.build(), defaults=family.settings, cache_backend="magcache", cache_config=config
    ) as omni:
        skipped = []
        for seed in range(REQUESTS + 1):
            (output,) = omni.generate([family.prompt(seed)], asked(family, STEPS, seed, 3.0), use_tqdm=False)
            assert output.error is None
            skipped.append(output.skipped_steps)
    assert skipped[:-1] == [0] * REQUESTS and skipped[-1] > 0
