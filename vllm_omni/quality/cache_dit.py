"""The cache-dit package (DBCache, with a Taylor calibrator where asked) on a plain diffusers pipeline.

The package keeps one state per model and wraps the call of the pipeline's class, so requests cannot share a forward:
the engine refuses this backend. It is here to be compared with.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.gates.gate import check_gate_config
from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig
from vllm_omni.errors import InvalidValueError


class CacheDitBackend(CacheBackend):
    """`rel_l1_thresh` is the package's residual threshold; `predictor="linear"` its first-order Taylor calibrator."""

    name = "cache_dit"

    def __init__(self, config: DiffusionCacheConfig) -> None:
        super().__init__(config)
        if find_spec("cache_dit") is None:
            raise InvalidValueError(
                "cache_backend", self.name, "needs a package: pip install 'vllm-omni-magcache[cache-dit]'"
            )
        check_gate_config(self.name, config)
        if config.memory_budget_mb is not None:
            raise InvalidValueError(
                "memory_budget_mb", config.memory_budget_mb, "cannot be kept by cache_dit; leave it out"
            )

    def enable(self, pipeline: Any) -> None:
        """Let cache-dit put its blocks on `pipeline`; InvalidValueError where it does not know it."""
        import cache_dit

        self.disable(pipeline)
        config, given = self.config, self.config.model_fields_set
        settings: dict[str, Any] = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}  # its fast form, any depth
        settings["residual_diff_threshold"] = config.rel_l1_thresh
        if "mag_max_skip_steps" in given:
            settings["max_continuous_cached_steps"] = config.mag_max_skip_steps
        if config.num_inference_steps is not None:
            settings["num_inference_steps"] = config.num_inference_steps
            settings["max_warmup_steps"] = max(1, int(config.mag_retention_ratio * config.num_inference_steps + 0.5))
        settings = {name: value for name, value in settings.items() if value is not None}
        taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if config.predictor == "linear" else None
        try:
            cache_dit.enable_cache(pipeline, cache_config=cache_dit.DBCacheConfig(**settings), calibrator_config=taylor)
        except ValueError as error:
            raise InvalidValueError("cache_backend", self.name, f"does not take this pipeline: {error}") from error
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Each call of the pipeline begins afresh by itself."""
        if not self.enabled:
            self.enable(pipeline)

    def disable(self, pipeline: Any) -> None:
        if self.enabled:
            import cache_dit

            cache_dit.disable_cache(pipeline)
            self.enabled = False
