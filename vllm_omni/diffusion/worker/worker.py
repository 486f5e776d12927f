"""Owns the model on one device: the pipeline, its arguments, and its cache backends. The runner runs requests on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_omni.diffusion.cache.base import StackBackend, store_for
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.cache.settings import CacheSettings, engine_backend, made_with, override, parse
from vllm_omni.diffusion.cache.standalone import refuse_other_caches
from vllm_omni.diffusion.data import DiffusionCacheConfig, OmniDiffusionConfig
from vllm_omni.diffusion.denoiser.specs import denoisers_of
from vllm_omni.diffusion.loader import load_pipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.arguments import ArgumentBuilder, generator_of
from vllm_omni.diffusion.worker.request import PlanOf, Request
from vllm_omni.diffusion.worker.runner import ModelRunner
from vllm_omni.errors import OmniError
from vllm_omni.kernels.placement import place
from vllm_omni.model_folder import generation_defaults


class DiffusionWorker:
    """`load_model` first; then `check` and `start` requests, which its `runner` runs."""

    pipeline: Any
    runner: ModelRunner
    arguments: ArgumentBuilder

    def __init__(self, config: OmniDiffusionConfig) -> None:
        self.config = config
        self.default_cache: CacheSettings | None = None  # the engine's own cache setting
        kept = config.cache_config or DiffusionCacheConfig()
        if (name := engine_backend(config.cache_backend)) != "none":  # a wrong name fails before any weight loads
            self.default_cache = parse(name, kept)
        self.store = store_for(kept)  # of all backends
        self._backends: dict[str, StackBackend] = {}
        self._places: dict[str, torch.device] = {}  # where components were that this has moved

    def load_model(self, pipeline: Any = None, defaults: dict[str, Any] | None = None) -> None:
        """Load the pipeline, or take one that is loaded, and enable the engine's cache on it."""
        self.from_folder = pipeline is None
        if pipeline is None:
            defaults = generation_defaults(self.config.model)
            pipeline = load_pipeline(self.config)
        else:
            self._places = place(pipeline, self.config.component_devices)
        self.pipeline = pipeline
        try:
            for module in denoisers_of(pipeline).values():
                refuse_other_caches(module)
            self.runner = ModelRunner(pipeline, self.config)
            self.runner.room.govern(self.store)
            self.arguments = ArgumentBuilder(pipeline, defaults or {}, self.config)
            if self.default_cache is not None:
                self._backend(self.default_cache)
        except OmniError:
            self._put_back()
            raise

    def _put_back(self) -> None:
        """Move the components of somebody's pipeline to where they were."""
        for name, device in self._places.items():
            getattr(self.pipeline, name).to(device)

    def check(self, request: OmniDiffusionRequest) -> tuple[dict[str, Any], CacheSettings | None]:
        """The pipeline arguments and the cache of a request, or the error that its user should read."""
        arguments = self.arguments.build(request)
        self.runner.adapters.check(request.params.lora_request or ())
        settings = override(request.params.cache, self.default_cache)
        if settings is not None:
            own = arguments.get("sigmas") is not None or arguments.get("timesteps") is not None
            known = not own and self.pipeline.scheduler.order == 1  # otherwise the schedule may be longer
            self._backend(settings).check(settings, arguments.get("num_inference_steps") if known else None)
        return arguments, settings

    def start(
        self,
        request: OmniDiffusionRequest,
        arguments: dict[str, Any],
        settings: CacheSettings | None,
        plan_of: PlanOf | None = None,
    ) -> tuple[Request, int | None]:
        """Begin a checked request, or a trial with a plan of its own; returns its state and its seed."""
        generator, seed = generator_of(request)
        running = self.runner.start(
            request,
            arguments | {"generator": generator},
            self._backend(settings) if settings is not None else None,
            settings,
            plan_of,
        )
        return running, seed

    @property
    def learner(self) -> MagCacheBackend | None:
        """The engine's own backend, if it may learn a profile."""
        backend = self._backends.get(self.default_cache.backend) if self.default_cache is not None else None
        return backend if isinstance(backend, MagCacheBackend) and backend.learning is not None else None

    def weights_changed(self) -> None:
        """Have the caches look for profiles of the weights that the denoiser has now."""
        for backend in self._backends.values():
            if isinstance(backend, MagCacheBackend):
                backend.weights_changed()

    @property
    def profile_names(self) -> list[str]:
        """Of the cache profiles in use by default."""
        backend = self._backends.get(self.default_cache.backend) if self.default_cache is not None else None
        return [profile.name for profile in backend.profiles] if backend is not None else []

    @property
    def cache_bytes(self) -> int:
        """Residual bytes held by all requests now."""
        return self.store.used

    def close(self) -> None:
        """Take caches and adapters off the pipeline, and put its components where they were."""
        self.runner.components.quiet()
        for backend in self._backends.values():
            backend.disable(self.pipeline)
        self._backends.clear()
        self.runner.adapters.close()
        self._put_back()

    def agree_on_memory(self, room: int | None, counted: Callable[[int], int]) -> None:
        """Plan with `room` free bytes from now on, and count what is kept, as all ranks do."""
        self.runner.memory.agree(room)
        self.store.counted = counted
        if self.store.budget is None and room is not None:
            self.store.budget = room // 2  # the other half is for forwards
        self.runner.room.govern(self.store)

    def _backend(self, settings: CacheSettings) -> StackBackend:
        """The backend of these settings, enabled on the pipeline when it is first asked for."""
        name = settings.backend
        if name not in self._backends:
            backend = get_cache_backend(name, made_with(name, self.default_cache))
            assert isinstance(backend, StackBackend)  # `engine_backend` let no other through
            backend.by_request = self.default_cache is None or self.default_cache.backend != name
            backend.many_ranks = self.config.parallel_config.ranks > 1
            backend.enable(self.pipeline, standalone=False, known=self.runner.denoisers)
            backend.store = self.store
            self._backends[name] = backend
        return self._backends[name]
