"""Owns the model on one device: loads it, puts the cache on it, and runs requests through the model runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.diffusion.cache.overrides import Choice, request_choice
from vllm_omni.diffusion.cache.selector import canonical_name, get_cache_backend
from vllm_omni.diffusion.cache.stack_backend import StackBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig, OmniDiffusionConfig
from vllm_omni.diffusion.loader import generation_defaults, load_pipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.arguments import ArgumentBuilder, generator_of
from vllm_omni.diffusion.worker.model_runner import ModelRunner, RequestState
from vllm_omni.errors import InvalidValueError


class DiffusionWorker:
    """`load_model` first; then `check`, `start`, `run` and `abort` requests."""

    def __init__(self, config: OmniDiffusionConfig) -> None:
        self.config = config
        self._default: Choice = None
        if config.cache_backend not in (None, "none"):  # a wrong name fails here, before any weight loads
            self._default = canonical_name(str(config.cache_backend)), config.cache_config or DiffusionCacheConfig()
        self._backends: dict[str, StackBackend] = {}

    def load_model(self, pipeline: Any = None, defaults: dict[str, Any] | None = None) -> None:
        """Load the pipeline, or take one that is loaded, and enable the engine's cache on it."""
        if pipeline is None:
            defaults = generation_defaults(self.config.model)
            pipeline = load_pipeline(self.config)
        self.pipeline = pipeline
        self.runner = ModelRunner(pipeline, self.config.lora_modules)
        self._arguments = ArgumentBuilder(pipeline, defaults or {}, self.config)
        if self._default is not None:
            self._backend(*self._default)

    def check(self, request: OmniDiffusionRequest) -> tuple[dict[str, Any], Choice]:
        """The pipeline arguments and the cache of a request, or the error that its user should read."""
        arguments = self._arguments.build(request)
        self.runner.adapters.check(request.params.lora_request or ())
        choice = request_choice(request.params.cache, self._default)
        if choice is not None:
            own = arguments.get("sigmas") is not None or arguments.get("timesteps") is not None
            known = not own and self.pipeline.scheduler.order == 1  # otherwise the schedule may be longer
            self._backend(*choice).check(choice[1], arguments.get("num_inference_steps") if known else None)
        return arguments, choice

    def fps(self, request: OmniDiffusionRequest) -> float:
        """Frames per second at which a video of this request is to be shown."""
        return self._arguments.fps(request)

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        """Tokens of prompt and negative prompt, without padding, for the text encoder that reads most of them."""
        parts, texts = vars(self.pipeline), [arguments.get(name) for name in ("prompt", "negative_prompt")]
        readers = [parts[name] for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if parts.get(name) is not None]
        limits = [reader.model_max_length for reader in readers]
        if limits:  # of several, the last is the one that a longer or shorter sequence can be asked of
            limits[-1] = min(limits[-1], arguments.get("max_sequence_length") or limits[-1])
        counts = [
            sum(min(len(read(text)["input_ids"]), limit) for text in texts if text)
            for read, limit in zip(readers, limits, strict=True)
        ]
        return max(counts, default=0)

    def start(
        self, request: OmniDiffusionRequest, arguments: dict[str, Any], choice: Choice
    ) -> tuple[RequestState, int | None]:
        """Begin a checked request; gives its state and its seed."""
        generator, seed = generator_of(request)
        backend, config = (self._backends[choice[0]], choice[1]) if choice is not None else (None, None)
        state = self.runner.start(
            request.request_id,
            arguments | {"generator": generator},
            backend,
            config,
            request.params.preview_every,
            request.params.lora_request or (),
            request.params.boundary_ratio,
        )
        return state, seed

    def run(self, states: Sequence[RequestState]) -> None:
        self.runner.run(states)

    def abort(self, state: RequestState, error: Exception) -> None:
        self.runner.abort(state, error)

    @property
    def default_cache(self) -> Choice:
        """The engine's own cache setting."""
        return self._default

    @property
    def profile_names(self) -> list[str]:
        """Of the cache profiles in use by default."""
        backend = self._backends.get(self._default[0]) if self._default is not None else None
        return backend.profile_names if backend is not None else []

    @property
    def defaults(self) -> dict[str, Any]:
        """The model's own default arguments."""
        return self._arguments.defaults

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of it, in pixels."""
        return self._arguments.multiple

    @property
    def cache_bytes(self) -> int:
        """Residual bytes held by all requests now."""
        return max((backend.store.used for backend in self._backends.values()), default=0)  # they share one store

    def close(self) -> None:
        for backend in self._backends.values():
            backend.disable(self.pipeline)
        self._backends.clear()
        self.runner.adapters.close()

    def _backend(self, name: str, config: DiffusionCacheConfig) -> StackBackend:
        """The backend of that name, enabled on the pipeline when it is first asked for."""
        if name not in self._backends:
            backend = get_cache_backend(name, config)
            if not isinstance(backend, StackBackend):
                raise InvalidValueError(
                    "cache_backend",
                    name,
                    "keeps one state per model and cannot serve requests; enable it on a plain pipeline, "
                    "or serve with 'fbcache', the same rule per request",
                )
            backend.enable(self.pipeline, standalone=False)
            for other in self._backends.values():  # one budget for all
                backend.store = other.store
            self._backends[name] = backend
        return self._backends[name]
