"""The published curves that ship: complete, with their source, chosen by checkpoint, planned jointly over branches."""

from __future__ import annotations

import pytest
from planning import planned

from vllm_omni.diffusion.cache.plan.curve import resample
from vllm_omni.diffusion.cache.plan.rule import magcache_plan
from vllm_omni.diffusion.cache.profile import find_profiles, profile_names, shipped_profile
from vllm_omni.diffusion.data import DiffusionCacheConfig

PUBLISHED = [name for name in profile_names() if shipped_profile(name).provenance.get("kind") == "published"]


def test_dozens_of_published_curves_ship() -> None:
    assert len(PUBLISHED) >= 70


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_curve_is_complete_and_has_its_source(name: str) -> None:
    profile = shipped_profile(name)
    assert profile.name == name
    assert len(profile.ratios) == profile.provenance["steps"] and profile.ratios[0] == 1
    assert all(0.5 < ratio < 1.8 for curve in (profile.ratios, *profile.branches.values()) for ratio in curve)
    assert all(len(curve) == len(profile.ratios) and curve[0] == 1 for curve in profile.branches.values())
    assert "repo" in profile.provenance["source"] or profile.provenance["trust"] == "third party"
    if profile.provenance["trust"] != "official":
        plain = [model for model in profile.models if "HunyuanVideo-1.5" not in model]
        assert not plain, "what its makers did not measure is used by name only, but where nothing else is known"


def test_a_curve_is_found_by_checkpoint_and_never_by_class() -> None:
    claimed = [model for name in PUBLISHED for model in shipped_profile(name).models]
    assert len(claimed) == len(set(claimed)) >= 25
    for name in PUBLISHED:
        for model in shipped_profile(name).models:
            assert [p.name for p in find_profiles(model, "no such fingerprint")] == [name]
    for stranger in ("black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.2-klein-4B", "FluxTransformer2DModel"):
        assert not find_profiles(stranger, "no such fingerprint")


def test_a_step_is_skipped_only_if_every_branch_allows_it() -> None:
    """Of two branches the worse decides at each step, whichever it is."""
    calm, wild = [1.0] * 10, [1.0, 1, 1, 1, 1.3, 1, 1, 0.7, 1, 1]
    alone = magcache_plan(wild, 0.2, 9, 0.0)
    assert magcache_plan(calm, 0.2, 9, 0.0, True, [wild]) == magcache_plan(wild, 0.2, 9, 0.0, True, [calm]) == alone
    assert not alone[3] and alone[4]
    early, late = [1.0, 1, 1.5, 1, 1, 1, 1, 1], [1.0, 1, 1, 1, 1, 1.5, 1, 1]
    assert magcache_plan(early, 0.2, 9, 0.0, True, [late]) == (True, False, True, False, False, True, False, True)


@pytest.mark.parametrize("steps", [20, 50])
def test_a_plan_uses_every_branch_of_its_profile(steps: int) -> None:
    profile = shipped_profile("qwen-image-edit-50")
    config = DiffusionCacheConfig(mag_threshold=0.06, mag_max_skip_steps=3, mag_retention_ratio=0.2)
    sigmas = tuple(1 - i / steps for i in range(steps))
    plan = planned(config, profile.ratios, profile, steps, sigmas).compute
    cond, uncond = (resample(curve, steps) for curve in profile.branches.values())
    assert plan == magcache_plan(cond, 0.06, 3, 0.2, True, [uncond])
    assert plan == magcache_plan(uncond, 0.06, 3, 0.2, True, [cond])
