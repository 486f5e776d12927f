"""Profile files: found for the checkpoint they were measured on, refused for others, and never loaded if broken."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import run_latents, tiny_flux
from planning import planned

from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.profile import (
    FORMAT,
    CacheProfile,
    find_profiles,
    fingerprint,
    load_profile,
    profile_names,
    shipped_profile,
)
from vllm_omni.diffusion.cache.settings import parse
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.learning import keep

STEPS = 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own profiles, instead of those of whoever runs the tests."""
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path / "profiles"))
    (tmp_path / "profiles").mkdir()
    return tmp_path / "profiles"


def measured(pipe: Any, name: str = "mine", steps: int = STEPS) -> CacheProfile:
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    backend.enable(pipe)
    run_latents(pipe, 0, seed=0, num_inference_steps=steps)
    backend.disable(pipe)
    assert backend.calibration is not None
    return backend.calibration.profile(name, "FluxTransformer2DModel", fingerprint(pipe.transformer))


def content() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    vectors = np.cumsum(rng.standard_normal((STEPS, 8)), axis=0) + 2
    return {
        "format": FORMAT,
        "name": "made",
        "transformer_class": "FluxTransformer2DModel",
        "ratios": [1.0, 1.05, 0.99, 0.98, 0.97, 0.9],
        "sigmas": [1.0, 0.9, 0.75, 0.55, 0.3, 0.1],
        "gram": (vectors @ vectors.T).tolist(),
    }


# ------------------------------------------------------------------------------------------------------------- found


def test_shipped_profiles_are_valid_and_of_this_format() -> None:
    for name in profile_names():
        assert shipped_profile(name).format == FORMAT


def test_a_users_profile_is_found_only_for_its_checkpoint(folder: Path) -> None:
    pipe, other = tiny_flux(), tiny_flux()
    with torch.no_grad():
        next(other.transformer.parameters()).flatten()[0] += 1
    measured(pipe).save(folder / "a.json")
    backend = MagCacheBackend(DiffusionCacheConfig())
    backend.enable(pipe)
    assert [profile.name for profile in backend.profiles] == ["mine"]
    with pytest.raises(InvalidValueError, match="no magnitude curve is known"):
        MagCacheBackend(DiffusionCacheConfig()).enable(other)


def test_the_newest_profile_is_taken_and_a_broken_file_is_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setattr(logging.getLogger("vllm_omni"), "propagate", True)
    pipe = tiny_flux()
    for age, name in enumerate(("older", "newer")):
        measured(pipe, name).save(folder / f"{name}.json")
        os.utime(folder / f"{name}.json", (1_000_000 + age, 1_000_000 + age))
    (folder / "torn.json").write_text('{"name": "x"')
    assert [p.name for p in find_profiles("", fingerprint(pipe.transformer))] == ["newer", "older"]
    backend = MagCacheBackend(DiffusionCacheConfig(nfe=3))
    backend.enable(pipe)
    run_latents(pipe, num_inference_steps=STEPS)
    assert backend.last_request is not None and backend.last_request.settings["profile"] == "newer"
    assert "torn.json" in caplog.text


def test_the_profile_with_the_nearest_step_count_is_taken(folder: Path) -> None:
    """And as the demo has two, its own settings say which one a request had."""
    long, short = measured(tiny_flux(), "long", 12), measured(tiny_flux(), "short")
    for profile in (long, short):
        profile.save(folder / f"{profile.name}.json")
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(speedup=2))
    backend.enable(pipe)
    assert {profile.name for profile in backend.profiles} == {"long", "short"}
    settings = parse("magcache", DiffusionCacheConfig(speedup=2, profile="short"))
    named = backend.refresh(pipe, None, request_id="x", settings=settings)
    assert named is not None and named.settings["profile"] == "short"
    for steps, expected in ((4, "short"), (8, "short"), (9, "long"), (12, "long"), (40, "long")):
        run_latents(pipe, num_inference_steps=steps)
        assert backend.last_request is not None
        assert backend.last_request.settings["profile"] == expected, steps
    assert {len(p.ratios) for p in find_profiles("", shipped_profile("demo").fingerprint or "")} == {28, 50}


def test_a_hub_id_does_not_match_a_profile_with_a_fingerprint(folder: Path) -> None:
    CacheProfile.from_dict(content() | {"models": ["some/model"], "fingerprint": "0" * 32}).save(folder / "a.json")
    assert not find_profiles("some/model", "1" * 32)
    assert [p.name for p in find_profiles("", "0" * 32)] == ["made"]


# ----------------------------------------------------------------------------------------------------------- refused


def test_a_profile_of_other_weights_is_refused_unless_forced(tmp_path: Path) -> None:
    pipe, file = tiny_flux(), tmp_path / "other.json"
    CacheProfile.from_dict(content() | {"fingerprint": "0" * 32}).save(file)
    backend = MagCacheBackend(DiffusionCacheConfig(profile=str(file)))
    with pytest.raises(InvalidValueError, match=r"measured on other weights.*profile_insist=True"):
        backend.enable(pipe)
    assert not backend.profiles and not backend.is_enabled()
    insisting = MagCacheBackend(DiffusionCacheConfig(profile=str(file), profile_insist=True, nfe=3))
    insisting.enable(pipe)
    run_latents(pipe, num_inference_steps=STEPS)
    assert insisting.last_request is not None and insisting.last_request.computed_steps == 3


def text_of(**changes: Any) -> Callable[[], str]:
    return lambda: json.dumps(content() | changes)


def gram_with(change: Callable[[np.ndarray], None]) -> Callable[[], str]:
    def text() -> str:
        made = content()
        matrix = np.asarray(made["gram"])
        change(matrix)
        return json.dumps(made | {"gram": matrix.tolist()})

    return text


def negative_diagonal(matrix: np.ndarray) -> None:
    matrix[2, 2] = -1.0


def indefinite(matrix: np.ndarray) -> None:
    matrix[1, 4] = matrix[4, 1] = 10 * matrix.max()


def tuned(terms: dict[Any, Any]) -> dict[str, Any]:
    """A budget of three of six steps with weights of its own."""
    return {"speedup": 2, "terms": terms}


HOSTILE: dict[str, tuple[Callable[[], str], str]] = {
    "truncated": (lambda: json.dumps(content())[:-40], "complete JSON"),
    "empty": (lambda: "", "complete JSON"),
    "deep nesting": (lambda: "[" * 200_000, "complete JSON"),
    "nested provenance": (lambda: '{"provenance": ' + '{"a": ' * 100_000, "complete JSON"),
    "endless number": (lambda: '{"ratios": [' + "9" * 5000 + "]}", "complete JSON"),
    "old format": (lambda: json.dumps({k: v for k, v in content().items() if k != "format"}), "calibrate again"),
    "new format": (text_of(format=FORMAT + 1), "format must be"),
    "a format of another kind": (text_of(format=[FORMAT]), "format must be"),
    "no class": (text_of(transformer_class=None), "transformer_class"),
    "nan ratio": (text_of(ratios=[1, 1, float("nan"), 1, 1, 1]), r"ratios\[2\]"),
    "huge ratio": (text_of(ratios=[1, 1e300, 1, 1, 1, 1]), r"ratios\[1\] must be"),
    "negative ratio": (text_of(ratios=[1, -1, 1, 1, 1, 1]), r"ratios\[1\]"),
    "ratios of text": (text_of(ratios="1,1,1"), "ratios"),
    "no ratios": (text_of(ratios=[]), "ratios"),
    "too many steps": (text_of(ratios=[1.0] * 1_000_000, sigmas=None, gram=None), "at most 1000 steps"),
    "steps of a billion": (text_of(steps=10**9), "steps"),
    "too few gains": (text_of(gains=[1.0]), "gains must be 6 numbers"),
    "a nan gain": (text_of(gains=[1, 1, float("nan"), 1, 1, 1]), "gains"),
    "gains without sigmas": (text_of(gains=[1.0] * 6, sigmas=None, gram=None), "sigmas must be given with"),
    "infinite decibels": (text_of(budgets=[{"speedup": 2, "psnr": float("inf")}]), "psnr"),
    "an unknown field of a budget": (text_of(budgets=[{"speedup": 2, "mask": "best"}]), "mask"),
    "no budgets": (text_of(budgets=None), "valid profile"),
    "a ratio of four hundred digits": (lambda: '{"format": 2, "ratios": [1, ' + "9" * 400 + "]}", "profile"),
    "budgets of text": (text_of(budgets="fast"), "MeasuredBudget is made from a dict"),
    "nan sigma": (text_of(sigmas=[1, 0.9, float("nan"), 0.5, 0.3, 0.1]), "sigmas"),
    "negative sigma": (text_of(sigmas=[1, 0.9, 0.8, 0.5, 0.3, -0.1]), "sigmas"),
    "gram without sigmas": (text_of(sigmas=None), "sigmas"),
    "huge gram": (gram_with(lambda matrix: matrix.__imul__(1e200)), "gram"),
    "infinite gram": (gram_with(lambda matrix: matrix.__setitem__((0, 0), np.inf)), "gram"),
    "negative diagonal": (gram_with(negative_diagonal), "gram.*positive semi-definite"),
    "not positive semi-definite": (gram_with(indefinite), "gram.*positive semi-definite"),
    "a branch of another length": (text_of(branches={"cond": [1.0, 1.0]}), "branches.cond"),
    "terms of a step that computes": (text_of(budgets=[tuned({0: [[0, 1.0]], 2: [[1, 1.0]], 4: [[3, 1.0]]})]), "terms"),
    "terms from a skipped step": (text_of(budgets=[tuned({2: [[1, 1.0]], 3: [[2, 1.0]], 4: [[1, 1.0]]})]), "terms"),
    "terms from later": (text_of(budgets=[tuned({1: [[2, 1.0]], 3: [[2, 1.0]], 4: [[2, 1.0]]})]), "terms"),
    "terms beyond the run": (text_of(budgets=[tuned({1: [[0, 1.0]], 3: [[2, 1.0]], 9: [[2, 1.0]]})]), "terms"),
    "terms of too few steps": (text_of(budgets=[tuned({1: [[0, 1.0]], 3: [[2, 1.0]]})]), "terms"),
    "terms of nothing": (text_of(budgets=[tuned({1: [[0, 1.0]], 3: [[2, 1.0]], 4: []})]), "terms"),
    "a nan weight": (text_of(budgets=[tuned({1: [[0, float("nan")]], 3: [[2, 1.0]], 4: [[2, 1.0]]})]), "terms"),
    "terms of text": (text_of(budgets=[tuned({"one": [[0, 1.0]]})]), "terms"),
    "a budget of no speed-up": (text_of(budgets=[{"speedup": 0.5}]), "speedup"),
    "a nan speed-up": (text_of(budgets=[{"speedup": float("nan")}]), "speedup"),
    "speed-ups out of order": (text_of(budgets=[{"speedup": 3}, {"speedup": 2}]), "each above the one before"),
    "unknown key": (text_of(ratioes=[1]), "did you mean 'ratios'"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_profile_is_refused_with_its_name(how: str, tmp_path: Path) -> None:
    text, message = HOSTILE[how]
    file = tmp_path / "bad.json"
    file.write_text(text())
    with pytest.raises(InvalidValueError, match=message) as caught:
        load_profile(file)
    assert "bad.json" in str(caught.value)


def test_files_of_the_profile_folder_that_cannot_be_read_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    for how, (text, _) in HOSTILE.items():
        (tmp_path / f"{how}.json").write_text(text())
    (tmp_path / "good.json").write_text(json.dumps(content() | {"fingerprint": "x" * 32}))
    assert [profile.name for profile in find_profiles("", "x" * 32)] == ["made"]
    assert caplog.text.count("passed over") >= len(HOSTILE) - 1


def test_a_learnt_profile_does_not_take_the_place_of_a_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes learn the same."""
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    bare = CacheProfile.from_dict(content() | {"fingerprint": "x" * 32})
    better = bare.model_copy(update={"gains": (1.0,) * len(bare.ratios)})
    for one in (bare, better, bare):
        keep(one)
    (file,) = tmp_path.glob("*")
    assert load_profile(file).gains is not None


def test_the_profile_behind_the_hostile_ones_is_valid(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(content()))
    assert load_profile(tmp_path / "good.json").name == "made"


def test_an_engine_with_a_hostile_profile_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(gram_with(negative_diagonal)())
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(profile=str(file)))
    with pytest.raises(InvalidValueError, match="positive semi-definite"):
        backend.enable(pipe)
    assert not backend.profiles and not backend.is_enabled() and not pipe.transformer._forward_hooks


def test_tuned_weights_are_for_the_schedule_and_the_forwards_that_they_were_tuned_for() -> None:
    terms = {2: ((0, 0.25), (1, 0.75)), 3: ((0, -0.5), (1, 1.5)), 4: ((1, 1.0),)}
    budgets = [{"speedup": 1.2, "terms": {}}, tuned(terms), {"speedup": 3}]
    profile = CacheProfile.from_dict(content() | {"budgets": budgets})
    assert CacheProfile.from_dict(json.loads(profile.model_dump_json())) == profile
    sigmas = profile.sigmas or ()

    def plan(of: tuple[float, ...] = sigmas, ratios: tuple[float, ...] = profile.ratios, **settings: Any) -> CachePlan:
        return planned(DiffusionCacheConfig(**settings), ratios, profile, len(of), of)

    for settings in ({"nfe": 3}, {"speedup": 2.0}):
        found = plan(**settings)
        assert (
            found.predictor == "tuned"
            and found.terms == terms
            and found.compute == (True, True, False, False, False, True)
        )
    closer = tuple(0.99 * sigma for sigma in sigmas)
    ours = tuple(0.99 * ratio for ratio in profile.ratios)
    for other in (
        plan(nfe=4),
        plan(nfe=5),
        plan(nfe=6),
        plan(nfe=2),
        plan(closer, nfe=3),
        plan((*sigmas, 0.01), nfe=3),
        plan(ratios=ours, nfe=3),
        plan(nfe=3, predictor="linear"),
        plan(nfe=3, compute_last_step=False),
        plan(mag_threshold=0.3),
        plan(steps_mask=found.compute),
    ):
        assert other.predictor != "tuned" and other.terms != terms


@pytest.mark.parametrize(
    "older",
    [
        {"predictors": [[2.0, "chebyshev"]], "forwards": 4, "branch_grams": {}},
        {"budgets": [{"speedup": 2, "mask": "rule", "predictor": "affine3", "psnr": 40.0, "terms": {"1": [[0, 1]]}}]},
    ],
)
def test_older_profiles_load_without_what_was_measured_of_other_plans(older: dict[str, Any]) -> None:
    profile = CacheProfile.from_dict(content() | older)
    assert not profile.budgets and profile.gram is not None
    assert profile.lacks == ["gains", "tuned weights", "figures"]
