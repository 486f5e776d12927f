"""Calibration measures what the blocks add, and its profile files are checked before anything of them is used."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from diffusers import FluxPipeline
from pipelines import CURVE, count_blocks, run_latents, tiny_flux
from probing import CFG, RESIDUAL_BYTES, cached, probed, sigmas_of

from vllm_omni.diffusion.cache.calibration import Calibration
from vllm_omni.diffusion.cache.magcache import (
    MagCacheBackend,
)
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile, load_profile
from vllm_omni.diffusion.cache.settings import parse
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError


def test_calibration_saves_and_loads_measured_ratios_and_products(calibrated: tuple[CacheProfile, Path]) -> None:
    profile, path = calibrated
    gram = np.array(profile.gram)
    assert profile.ratios[0] == 1.0 and gram.shape == (12, 12)
    assert np.allclose(gram, gram.T) and np.linalg.eigvalsh(gram)[0] > -1e-6 * np.trace(gram)
    assert profile.provenance["prompts"] == 2 and profile.provenance["steps"] == 12
    loaded = load_profile(path)
    assert (loaded.name, loaded.fingerprint, loaded.ratios) == (profile.name, profile.fingerprint, profile.ratios)
    assert (loaded.sigmas, loaded.gram, loaded.branches) == (profile.sigmas, profile.gram, profile.branches)


def test_calibration_measures_branches_apart_and_changes_no_latents(
    pipe: FluxPipeline, plain: dict[int, torch.Tensor]
) -> None:
    with cached(pipe, mag_calibrate=True) as backend, probed(pipe) as probe:
        assert torch.equal(run_latents(pipe, num_inference_steps=10), plain[10])
        backend.refresh(pipe, 10)
        run_latents(pipe, num_inference_steps=10, **CFG)
        assert backend.calibration is not None
        profile = backend.calibration.profile("tiny", "FluxTransformer2DModel", "f")
    assert len(profile.branches) == 2
    uncond = [r.norm(dim=-1) for r in probe.added[10:][1::2]]
    wanted = [1.0, *(float((b / a).mean()) for a, b in pairwise(uncond))]
    assert_close(np.float32(list(profile.branches.values())[1]), wanted)


def test_a_failed_prompt_does_not_enter_the_calibration(pipe: FluxPipeline) -> None:
    with cached(pipe, mag_calibrate=True) as backend:
        assert backend.calibration is not None
        with pytest.raises(InvalidValueError, match="at least one"):
            backend.calibration.profile("x", "FluxTransformer2DModel", "f")
        run_latents(pipe, num_inference_steps=10)
        with pytest.raises(InvalidValueError, match="same schedule"):
            run_latents(pipe, num_inference_steps=4)
        assert backend.calibration.requests == 1


@pytest.mark.parametrize("steps", [4, 12, 28, 50])
def test_a_profile_file_serves_any_step_count(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], steps: int
) -> None:
    _, path = calibrated
    exact = run_latents(pipe, num_inference_steps=steps)
    blocks = count_blocks(pipe)
    with cached(pipe, profile=str(path), predictor="affine", mag_threshold=0.5) as backend:
        latents = run_latents(pipe, num_inference_steps=steps)
        plan = backend.plan(steps, sigmas_of(pipe))
        assert backend.last_request is not None and backend.last_request.settings["predictor"] == "affine"
        assert blocks.count == plan.full_forwards and backend.store.used == 0
        assert backend.store.peak <= 2 * RESIDUAL_BYTES
    assert (latents - exact).norm() < 0.2 * exact.norm()
    blocks.remove()


def test_a_request_may_bring_its_own_profile(pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path]) -> None:
    """As the engine does: `refresh` with a request's settings over an engine that has only a curve."""
    _, path = calibrated
    own = DiffusionCacheConfig(profile=str(path), predictor="affine")
    with cached(pipe) as backend:
        run_latents(pipe, num_inference_steps=10)
        record = backend.refresh(pipe, 10, request_id="r", settings=parse("magcache", own))
        assert record is not None
        assert record.settings["predictor"] == "affine" and record.settings["profile"] == "tiny"


def broken(path: Path, profile: CacheProfile, how: str) -> str:
    text = profile.model_dump_json()
    content = json.loads(text)
    if how == "truncated":
        text = text[: len(text) // 2]
    elif how == "not json":
        text = "\x80\x02not json"
    elif how == "a list":
        text = "[1, 2]"
    else:
        if how == "nan ratio":
            content["ratios"][3] = float("nan")
        elif how == "zero ratio":
            content["ratios"][3] = 0.0
        elif how == "nan gram":
            content["gram"][0][0] = float("nan")
        elif how == "not psd":
            content["gram"] = (-np.array(content["gram"])).tolist()
        elif how == "not symmetric":
            content["gram"][0][1] += 1e3
        elif how == "ragged":
            content["gram"][2] = content["gram"][2][:-1]
        elif how == "short sigmas":
            content["sigmas"] = content["sigmas"][:-1]
        elif how == "unknown key":
            content["ratio"] = content.pop("ratios")
        elif how == "wrong class":
            content["transformer_class"] = "WanTransformer3DModel"
        text = json.dumps(content)
    path.write_text(text)
    return str(path)


BROKEN = {
    "truncated": "JSON",
    "not json": "JSON",
    "a list": "dict",
    "nan ratio": r"ratios\[3\]",
    "zero ratio": r"ratios\[3\]",
    "nan gram": "gram",
    "not psd": "gram.*positive semi-definite",
    "not symmetric": "gram.*symmetric",
    "ragged": "gram",
    "short sigmas": "sigmas",
    "unknown key": "ratio",
    "wrong class": "FluxTransformer2DModel",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_profile_file_loads_nothing(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], tmp_path: Path, how: str
) -> None:
    file = broken(tmp_path / "bad.json", calibrated[0], how)
    backend = MagCacheBackend(DiffusionCacheConfig(profile=file))
    with pytest.raises(InvalidValueError, match=BROKEN[how]):
        backend.enable(pipe)
    assert not backend.is_enabled() and not backend.profiles
    assert not pipe.transformer._forward_hooks and not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


@pytest.mark.parametrize("how", [how for how in BROKEN if how != "wrong class"])
def test_the_error_of_a_broken_profile_names_its_file(
    calibrated: tuple[CacheProfile, Path], tmp_path: Path, how: str
) -> None:
    file = broken(tmp_path / "bad.json", calibrated[0], how)
    with pytest.raises(InvalidValueError, match=r"bad\.json"):
        load_profile(Path(file))


def test_a_requests_profile_of_another_class_is_refused(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], tmp_path: Path
) -> None:
    file = broken(tmp_path / "bad.json", calibrated[0], "wrong class")
    with cached(pipe) as backend, pytest.raises(InvalidValueError, match="FluxTransformer2DModel"):
        backend.check(parse("magcache", DiffusionCacheConfig(profile=file)))


def test_a_missing_profile_lists_the_shipped_ones(pipe: FluxPipeline) -> None:
    with pytest.raises(InvalidValueError, match=r"profile must be a profile file, or a name such as 'demo'.*nowhere"):
        MagCacheBackend(DiffusionCacheConfig(profile="/nowhere.json")).enable(pipe)


def test_the_gram_predictor_without_a_matrix_is_refused_at_start_up() -> None:
    """Point 14: bad combinations are refused at start-up, not at the first request."""
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(mag_ratios=CURVE, predictor="affine"))
    with pytest.raises(InvalidValueError, match=r"predictor.*calibrate"):
        backend.enable(pipe)
    assert not backend.is_enabled() and not pipe.transformer._forward_hooks


def test_memory_that_only_the_measurement_lacks_is_no_affair_of_the_forward() -> None:
    calibration, asked = Calibration(), []
    state = calibration.state(Schedule(2, (1.0, 0.5)))

    class Computed:
        is_of_rows = True

        def ends(self) -> None:
            asked.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    for step in range(2):
        state.commit(("transformer", "default"), step, state.prepare(("transformer", "default"), step, Computed()))  # type: ignore[arg-type]
        state.observe(step, torch.ones(1, 4), None)
    assert len(asked) == 1 and calibration.requests == 0 and not calibration._outputs and state.computed_steps == 2
