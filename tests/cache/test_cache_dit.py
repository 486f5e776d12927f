"""The cache-dit package as a backend: on a plain pipeline only, and refused if it is not installed."""

from __future__ import annotations

from typing import Any

import pytest
from closeness import ROUNDINGS, assert_close, roundings_apart
from gating import STEPS
from pipelines import BlockCounter, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.errors import InvalidValueError


def test_cache_dit_is_refused_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.quality.cache_dit.find_spec", lambda name: None)
    with pytest.raises(InvalidValueError, match=r"pip install 'vllm-omni-magcache\[cache-dit\]'"):
        get_cache_backend("cache_dit", {})


def test_cache_dit_works_on_a_plain_pipeline_but_not_in_the_engine() -> None:
    pytest.importorskip("cache_dit")
    pipeline = tiny_flux()
    plain = run_latents(pipeline, num_inference_steps=STEPS)
    last = BlockCounter(pipeline.transformer.single_transformer_blocks[-1])
    backend = get_cache_backend("cache_dit", {"rel_l1_thresh": 0.9, "num_inference_steps": STEPS})
    assert backend is not None
    backend.enable(pipeline)
    cached = run_latents(pipeline, num_inference_steps=STEPS)
    assert 0 < last.count < STEPS and roundings_apart(cached, plain) > 4 * ROUNDINGS
    backend.disable(pipeline)
    assert_close(run_latents(pipeline, num_inference_steps=STEPS), plain)
    with pytest.raises(InvalidValueError, match="cannot serve requests"):
        Omni.from_pipe(tiny_flux(), cache_backend="cache_dit")


@pytest.mark.parametrize("settings", [{"nfe": 4}, {"predictor": "affine"}, {"memory_budget_mb": 1}])
def test_cache_dit_refuses_unsupported_settings(settings: dict[str, Any]) -> None:
    pytest.importorskip("cache_dit")
    with pytest.raises(InvalidValueError):
        get_cache_backend("cache_dit", settings)
