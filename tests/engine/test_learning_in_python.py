"""A profile is finished in Python too: in idle time, or, where there is none, when that is asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from teaching import SIZE, learning, teach

from vllm_omni import AsyncOmni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.learning import REQUESTS

STEPS = 4


@pytest.fixture(autouse=True)
def few_runs(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("GAIN_PROMPTS", 1), ("TUNED_ON", 2), ("JUDGED_ON", 5)):
        monkeypatch.setattr(f"vllm_omni.engine.learning.{name}", count)
    monkeypatch.setattr("vllm_omni.trials.SPEEDUPS", (2.0,))


@pytest.mark.slow
def test_a_call_makes_the_runs_that_a_server_makes_in_idle_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vllm_omni"), learning(folder) as omni:
        assert omni.learn() == "" and omni.engine.worker.learner is not None
        teach(omni, STEPS)
        assert "learn() makes the runs" in caplog.text
        (waiting,) = omni.generate("x", Params(num_inference_steps=STEPS, cache={"psnr": 0.1}, **SIZE), use_tqdm=False)
        assert waiting.skipped_steps == 0
        assert omni.learn() == ""
        (profile,) = omni.engine.worker.learner.profiles
        assert profile.lacks == []
        lowest = min(budget.psnr or 0.0 for budget in profile.budgets)
        asked = Params(num_inference_steps=STEPS, cache={"psnr": lowest}, **SIZE)
        assert omni.generate("x", asked, use_tqdm=False)[0].skipped_steps > 0


@pytest.mark.asyncio
async def test_an_asynchronous_engine_goes_on_with_its_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.engine.loop.IDLE_S", 0.01)
    args: dict[str, Any] = {"dtype": "float32", "cache_backend": "magcache", "cache_config": {"calibrate": "auto"}}
    async with AsyncOmni(str(folder), **args) as omni:
        for seed in range(REQUESTS):
            async for _ in omni.generate("red apple", Params(num_inference_steps=STEPS, seed=seed, **SIZE)):
                pass
        async with asyncio.timeout(60):
            while not (omni._loop.learning and omni._loop.learning.progress.startswith("gains: 2 of ")):
                await asyncio.sleep(0.001)
