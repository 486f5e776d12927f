"""Budgets of a request: so many full forwards, a speed-up or seconds; kept exactly, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from pipelines import DEFAULTS, embeds, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.plan.predictors import PREDICTORS
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import fingerprint
from vllm_omni.diffusion.cache.settings import BUDGETS, Budget, override, parse
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.worker.pace import settle
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.timing import Pace, Timings

STEPS = 12


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A profile file calibrated on `tiny_flux()` itself."""
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(mag_calibrate=True))
    backend.enable(pipe)
    for i in range(3):
        run_latents(pipe, i, seed=i, num_inference_steps=STEPS)
    backend.disable(pipe)
    assert backend.calibration is not None
    made = backend.calibration.profile("tiny", "FluxTransformer2DModel", fingerprint(pipe.transformer))
    file: Path = tmp_path_factory.mktemp("profile") / "tiny.json"
    made.save(file)
    return str(file)


@pytest.fixture(scope="module")
def tiny(profile: str) -> Iterator[Omni]:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"profile": profile}, defaults=DEFAULTS
    ) as omni:
        yield omni


def params(cache: Any, seed: int = 0, steps: int | None = STEPS, **others: Any) -> Params:
    return Params(num_inference_steps=steps, seed=seed, cache=cache, output_type="latent", **others)


def generate(omni: Omni, prompts: list[Any], asked: list[Params]) -> list[Any]:
    return omni.generate(prompts, asked, use_tqdm=False)


def check_batch(omni: Omni, prompts: list[Any], asked: list[Params], forwards: list[int | None]) -> None:
    """Every promise exactly kept in one mixed batch, and every picture that of the request alone."""
    together = generate(omni, prompts, asked)
    for prompt, request, output, nfe in zip(prompts, asked, together, forwards, strict=True):
        assert output.error is None, output.error
        alone = generate(omni, [prompt], [request])[0]
        assert_close(output.latents, alone.latents, request.cache)
        if nfe is not None:
            assert output.computed_steps == sum(output.plan) == nfe, request.cache
            assert output.skipped_steps == output.num_inference_steps - nfe
    assert omni.engine.worker.cache_bytes == 0


# ----------------------------------------------------------------------------------------------------------------- kept


def test_every_budget_is_kept_in_one_mixed_batch(tiny: Omni) -> None:
    caches: list[tuple[Any, int, int | None]] = [
        *(({"nfe": 5, "predictor": name}, STEPS, 5) for name in PREDICTORS),
        ({"nfe": 2}, STEPS, 2),
        ({"nfe": STEPS}, STEPS, STEPS),
        ({"speedup": 2.0}, STEPS, 6),
        ({"speedup": 3}, 20, 7),
        ({"nfe": 1, "compute_last_step": False}, 7, 1),
        ({"nfe": 1}, 1, 1),
        ("fast", STEPS, None),
        ("off", 9, 9),
        ({"steps_mask": [1, 0, 0]}, STEPS, None),
        (None, 15, None),
    ]
    asked = [params(cache, i, steps) for i, (cache, steps, _) in enumerate(caches)]
    forwards = [None if cache == "off" else nfe for cache, _, nfe in caches]
    check_batch(tiny, [embeds(i) for i in range(len(asked))], asked, forwards)


@pytest.mark.slow
def test_budgets_are_kept_on_the_demo_model(demo: Omni) -> None:
    caches: list[tuple[Any, int, int | None]] = [
        ({"nfe": 14}, 28, 14),
        ({"nfe": 7, "predictor": "affine"}, 28, 7),
        ({"speedup": 3.0}, 28, 9),
        ({"speedup": 2.0, "predictor": "affine"}, 50, 25),
        ({"nfe": 5}, 10, 5),
        ("balanced", 28, None),
        ("off", 6, None),
    ]
    prompts = ["red apple", "penguin", "rocket", "banana", "guitar", "octopus", "cactus"]
    asked = [params(cache, i, steps) for i, (cache, steps, _) in enumerate(caches)]
    check_batch(demo, prompts, asked, [nfe for _, _, nfe in caches])


@pytest.mark.slow
def test_a_budget_is_nearer_than_fewer_steps_and_than_the_rule(demo: Omni) -> None:
    prompts = ["red apple", "penguin", "rocket", "banana"]

    def latents(cache: Any, steps: int = 28) -> torch.Tensor:
        got = generate(demo, prompts, [params(cache, 700 + i, steps) for i in range(len(prompts))])
        return torch.cat([output.latents for output in got])

    exact = latents("off")
    planned, fewer = latents({"nfe": 14}), latents("off", 14)
    rule = latents({"threshold": 0.12, "max_skip_steps": 2, "retention_ratio": 0.15})
    error = (planned - exact).norm()
    assert error < 0.4 * (fewer - exact).norm() and error < 0.7 * (rule - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "least_db"), [(10, 60.0), (20, 74.0), (50, 74.0)])
def test_a_profile_of_28_steps_serves_other_step_counts(demo: Omni, steps: int, least_db: float) -> None:
    """Half of the steps, as promised, and as near as docs/quality.md says (means there: 63.7, 83.6 and 79.3 dB)."""
    prompts = ["red apple", "penguin", "rocket", "banana"]
    cache = {"speedup": 2.0, "profile": "demo"}

    def pictures(cache: Any) -> tuple[np.ndarray, list[Any]]:
        some = range(len(prompts))
        asked = [Params(num_inference_steps=steps, seed=700 + i, cache=cache, output_type="np") for i in some]
        outputs = generate(demo, prompts, asked)
        return np.stack([output.images[0] for output in outputs]).astype(np.float64), outputs

    (exact, _), (got, outputs) = pictures("off"), pictures(cache)
    assert all((o.computed_steps, o.skipped_steps) == (steps // 2, steps // 2) for o in outputs)
    assert all(o.cache_settings["profile"] == "demo" for o in outputs)
    assert (-10 * np.log10(((got - exact) ** 2).mean(axis=(1, 2, 3)))).mean() >= least_db


def test_the_output_reports_the_budget(tiny: Omni) -> None:
    asked = [params({"nfe": 4}), params({"speedup": 2}), params(None)]
    four, twice, none = (o.cache_settings for o in generate(tiny, [embeds(0)] * 3, asked))
    assert four["nfe"] == 4 and "speedup" not in four and "threshold" not in four
    assert twice["speedup"] == 2.0 and "nfe" not in twice
    assert none["preset"] == "auto" and not {"nfe", "speedup", "threshold"} & none.keys()
    assert [s["planned_forwards"] for s in (four, twice, none)] == [4, 6, 6]


def test_the_engines_budget_is_the_default_of_its_requests(profile: str) -> None:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"profile": profile, "nfe": 4}, defaults=DEFAULTS
    ) as omni:
        caches: list[Any] = [None, {"predictor": "reuse"}, {"nfe": 6}, {"speedup": 4}, {"steps_mask": [1] * STEPS}]
        got = generate(omni, [embeds(0)] * 5, [params(cache) for cache in caches])
        assert [output.computed_steps for output in got] == [4, 4, 6, 3, STEPS]
        preset = generate(omni, [embeds(0)], [params("fast")])[0]
        assert preset.cache_settings["preset"] == "fast" and preset.computed_steps == 4


def test_a_curve_alone_suffices_for_a_budget() -> None:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"mag_ratios": [1.0] + [0.97] * 27}, defaults=DEFAULTS
    ) as omni:
        names = ("auto", "reuse", "linear")
        asked = [params({"nfe": 5, "predictor": name}) for name in names]
        assert [o.computed_steps for o in generate(omni, [embeds(0)] * 3, asked)] == [5] * 3
        refused = generate(omni, [embeds(0)] * 2, [params({"nfe": 5, "predictor": "affine"}), params("off")])[0]
        assert isinstance(refused.error, InvalidValueError)


def test_a_plain_pipeline_keeps_a_budget(profile: str) -> None:
    pipe = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(profile=profile, speedup=3.0))
    backend.enable(pipe)
    for steps, nfe in ((STEPS, 4), (20, 7)):
        run_latents(pipe, num_inference_steps=steps)
        assert backend.last_request is not None and backend.last_request.computed_steps == nfe


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"nfe": 13}, r"nfe must be between 2 and 12 for 12 steps \(nearest: 12\), got 13"),
        ({"nfe": 1}, r"nfe must be between 2 and 12 for 12 steps \(nearest: 2\), got 1"),
        ({"nfe": 0}, r"nfe must be at least 2"),
        ({"nfe": 2.5}, r"nfe.*got 2.5"),
        ({"nfe": "many"}, r"nfe.*got 'many'"),
        ({"speedup": 0.5}, r"speedup must be at least 1"),
        ({"speedup": 50}, r"speedup is out of reach in 12 steps \(nearest: 6, 2 full forwards\), got 50"),
        ({"speedup": float("nan")}, r"speedup"),
        ({"speedup": float("inf")}, r"speedup"),
        ({"seconds": -1}, r"seconds"),
        ({"seconds": float("inf")}, r"seconds"),
        ({"seconds": 2, "nfe": 6}, r"nfe and seconds each make the plan: give one"),
        ({"seconds": 2, "threshold": 0.1}, r"seconds and threshold each make the plan: give one"),
        ({"nfe": 6, "speedup": 2}, r"nfe and speedup each make the plan: give one"),
        ({"nfe": 6, "steps_mask": [1, 0]}, r"nfe and steps_mask each make the plan: give one"),
        ({"nfe": 6, "threshold": 0.1}, r"nfe and threshold each make the plan: give one"),
        ({"speedup": 2, "preset": "fast"}, r"speedup and preset each make the plan: give one"),
        ({"nfes": 6}, r"cache has no 'nfes'; did you mean 'nfe'"),
    ],
)
def test_an_impossible_budget_is_refused_at_admission(tiny: Omni, cache: Any, message: str) -> None:
    bad, good = generate(tiny, [embeds(0)] * 2, [params(cache), params({"nfe": 4})])
    assert isinstance(bad.error, InvalidValueError)
    assert bad.computed_steps == 0 and good.error is None and good.computed_steps == 4
    with pytest.raises(InvalidValueError, match=message):
        raise bad.error


def test_a_budget_that_the_real_schedule_cannot_keep_fails_alone(tiny: Omni) -> None:
    asked = [params({"nfe": 8}, steps=None, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2]), params({"nfe": 4}, seed=1)]
    bad, good = generate(tiny, [embeds(0), embeds(1)], asked)
    assert good.error is None and good.computed_steps == 4
    with pytest.raises(InvalidValueError, match=r"nfe must be between 2 and 5 for 5 steps \(nearest: 5\), got 8"):
        raise bad.error
    assert tiny.engine.worker.cache_bytes == 0


def test_settings_with_two_plans_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="nfe and speedup each make the plan"):
        DiffusionCacheConfig(nfe=4, speedup=2.0)
    with pytest.raises(InvalidValueError, match="speedup and steps_mask each make the plan"):
        DiffusionCacheConfig(speedup=2.0, steps_mask=(True, False))


def test_a_request_may_replace_the_engines_budget() -> None:
    engine = parse("magcache", DiffusionCacheConfig(nfe=4))
    for asked in ({"threshold": 0.2}, "high", {"steps_mask": [1, 0]}):
        settings = override(asked, engine)
        assert settings is not None and not isinstance(settings.plan, Budget)


@pytest.mark.parametrize("own", [{"nfe": 4}, {"preset": "high"}, {"mag_threshold": 0.1}, {}])
def test_a_null_in_a_request_leaves_the_engines_setting(own: dict[str, Any]) -> None:
    engine = parse("magcache", DiffusionCacheConfig(**own))
    for name in (*BUDGETS, "preset", "threshold", "steps_mask", "predictor", "mag_ratios", "profile", "backend"):
        assert override({name: None}, engine) == override({}, engine)


@pytest.mark.parametrize("asked", [{"psnr": True}, {"nfe": True}, {"threshold": False}])
def test_true_and_false_are_no_numbers(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=f"{next(iter(asked))}.*must be a number"):
        override(asked, None)


def test_one_setting_under_two_names_has_one_value() -> None:
    assert override({"threshold": 0.1, "mag_threshold": 0.1}, None) == override({"threshold": 0.1}, None)
    with pytest.raises(InvalidValueError, match="give one value"):
        override({"threshold": 0.1, "mag_threshold": 0.2}, None)


def test_a_schedule_of_300_steps_keeps_its_budget(tiny: Omni) -> None:
    promise, plain = tiny.generate(
        [embeds(0), embeds(1)],
        [
            Params(num_inference_steps=300, cache={"nfe": 14}, output_type="latent"),
            Params(num_inference_steps=120, output_type="latent"),
        ],
        use_tqdm=False,
    )
    assert promise.ok and promise.computed_steps == 14 and promise.skipped_steps == 286
    assert plain.ok and plain.skipped_steps == 60


# -------------------------------------------------------------------------------------------------------------- seconds


def nearest(omni: Omni) -> float:
    """The smallest budget by what has been measured by now; the next request moves the average."""
    hopeless = generate(omni, [embeds(0)], [params({"seconds": 1e-6})])[0]
    found = re.search(r"seconds is out of reach for 12 steps of this size \(nearest: ([\d.e-]+)", str(hopeless.error))
    assert isinstance(hopeless.error, InvalidValueError) and found is not None
    return float(found[1])


def test_seconds_are_refused_before_a_measurement_and_kept_after_it(profile: str) -> None:
    with Omni.from_pipe(
        tiny_flux(), cache_backend="magcache", cache_config={"profile": profile}, defaults=DEFAULTS
    ) as omni:
        early = generate(omni, [embeds(0)], [params({"seconds": 1.0})])[0]
        with pytest.raises(InvalidValueError, match="seconds needs a request of this size"):
            raise early.error
        for seed in range(3):
            generate(omni, [embeds(0)], [params({"nfe": 6}, seed)])
        for times in (2, 4):  # how many fit is the machine's
            seconds = times * nearest(omni)
            kept = generate(omni, [embeds(0)], [params({"seconds": seconds})])[0]
            assert kept.error is None and 2 <= kept.computed_steps <= STEPS
            assert kept.cache_settings["seconds"] == seconds
            assert kept.cache_settings["planned_forwards"] == kept.computed_steps
        ample = generate(omni, [embeds(0)], [params({"seconds": 1e6})])[0]
        assert ample.computed_steps == STEPS
        assert omni.engine.worker.cache_bytes == 0


def settled(pace: Pace, seconds: float) -> Any:
    """The budget that so many seconds become, for ten steps of a size."""
    schedule = Schedule(10, tuple(1 - i / 10 for i in range(10)))
    return settle(pace, parse("magcache", DiffusionCacheConfig(seconds=seconds)), "size", schedule).plan


def test_seconds_allow_as_many_forwards_as_fit() -> None:
    pace, watch = Pace(), Timings(encode_s=1.0)
    for step, skipped in enumerate((False, False, True, False, True)):
        pace.note("size", watch, step, 0.1 if skipped else 1.0, alone=True, skipped=skipped)
    pace.note("size", watch, 5, 9.0, alone=False, skipped=False)  # shared with others: says nothing of this one alone
    pace.finish("size", watch)
    for seconds, nfe in ((5.6001, 4), (6.4, 4), (6.5001, 5), (100.0, 10)):
        assert settled(pace, seconds).nfe == nfe
    with pytest.raises(InvalidValueError, match=r"nearest: 3.8, 2 full forwards"):
        settled(pace, 3.0)


def test_seconds_are_refused_on_a_plain_pipeline(profile: str) -> None:
    pipe = tiny_flux()
    MagCacheBackend(DiffusionCacheConfig(profile=profile, seconds=3.0)).enable(pipe)
    with pytest.raises(InvalidValueError, match="seconds needs the engine"):
        run_latents(pipe, num_inference_steps=STEPS)
