"""The engine: composes scheduler and worker. The loop is `step`."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_omni.diffusion.cache.overrides import Choice
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.sched.step_scheduler import StepScheduler
from vllm_omni.diffusion.worker.coroutine import Failed, Finished
from vllm_omni.diffusion.worker.model_runner import RequestState
from vllm_omni.diffusion.worker.worker import DiffusionWorker
from vllm_omni.errors import EngineClosedError, InvalidValueError, RequestAbortedError
from vllm_omni.outputs import OmniRequestOutput


@dataclass
class _Entry:
    """A request in the engine: as asked, as checked, and (once admitted) as it runs."""

    request: OmniDiffusionRequest
    arguments: dict[str, Any]
    choice: Choice
    arrived: float = field(default_factory=time.perf_counter)
    state: RequestState | None = None
    seed: int | None = None
    fps: float | None = None


class DiffusionEngine:
    """Continuous batching at denoise-step level; one thread must make all calls."""

    def __init__(
        self, config: OmniDiffusionConfig, pipeline: Any = None, defaults: dict[str, Any] | None = None
    ) -> None:
        self.config = config
        self.worker = DiffusionWorker(config)
        self.worker.load_model(pipeline, defaults)
        self.scheduler = StepScheduler(config.max_num_seqs)
        self._entries: dict[str, _Entry] = {}
        self._ended: list[OmniRequestOutput] = []
        self._closed = False

    def add_request(self, request: OmniDiffusionRequest) -> None:
        """Queue a request. Everything that can be refused is refused here, and costs nobody else anything."""
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if not request.request_id or request.request_id in self._entries:
            raise InvalidValueError("request_id", request.request_id, "must be new and not empty")
        arguments, choice = self.worker.check(request)
        self._entries[request.request_id] = _Entry(request, arguments, choice, fps=self.worker.fps(request))
        self.scheduler.add(request.request_id)

    def step(self) -> list[OmniRequestOutput]:
        """Admit, run one batch, and return the requests that ended."""
        with torch.inference_mode():
            for request_id in self.scheduler.admit():
                self._start(self._entries[request_id])
            batch = [self._state(request_id) for request_id in self.scheduler.schedule()]
            if batch:
                self.worker.run(batch)
            for state in batch:
                self._settle(state)
        ended, self._ended = self._ended, []
        return ended

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests between two steps; each still gives an output, whose error says so. Unknown ids are ignored."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is None:
                continue
            error = RequestAbortedError(f"request {request_id} was aborted")
            if entry.state is None:
                self._end(entry, Failed(error))
            else:
                with torch.inference_mode():
                    self.worker.abort(entry.state, error)
                self._settle(entry.state)

    def has_unfinished_requests(self) -> bool:
        return bool(self._entries) or bool(self._ended)

    def progress(self) -> list[OmniRequestOutput]:
        """Where every admitted request stands; a new preview comes once."""
        return [
            OmniRequestOutput(
                request_id,
                entry.request.prompt,
                images=entry.state.take_preview(),
                finished=False,
                seed=entry.seed,
                step=entry.state.step,
                num_inference_steps=entry.state.steps,
                computed_steps=len(entry.state.computed),
                skipped_steps=entry.state.cache.skipped_steps if entry.state.cache is not None else 0,
            )
            for request_id, entry in self._entries.items()
            if entry.state is not None
        ]

    def close(self) -> None:
        """Abort what runs, and leave the pipeline as it was."""
        if not self._closed:
            self.abort(list(self._entries))
            self._ended.clear()
            self.worker.close()
            self._closed = True

    def _state(self, request_id: str) -> RequestState:
        state = self._entries[request_id].state
        assert state is not None
        return state

    def _start(self, entry: _Entry) -> None:
        entry.state, entry.seed = self.worker.start(entry.request, entry.arguments, entry.choice)
        self._settle(entry.state)

    def _settle(self, state: RequestState) -> None:
        """A request that has just advanced either parked again or ended."""
        if isinstance(state.event, Finished | Failed):
            self._end(self._entries[state.request_id], state.event)
        else:
            self.scheduler.park(state.request_id, state.key, state.skips)

    def _end(self, entry: _Entry, event: Finished | Failed) -> None:
        del self._entries[entry.request.request_id]
        self.scheduler.remove(entry.request.request_id)
        self._ended.append(_output(entry, event))


def _output(entry: _Entry, event: Finished | Failed) -> OmniRequestOutput:
    now = time.perf_counter()
    output = OmniRequestOutput(entry.request.request_id, entry.request.prompt, seed=entry.seed)
    output.metrics = {"total_s": now - entry.arrived}
    if (state := entry.state) is not None:
        output.num_inference_steps, output.step = state.steps, state.steps or 0
        output.computed_steps, output.plan = len(state.computed), state.plan
        if state.cache is not None:
            output.computed_steps = state.cache.computed_steps
            output.skipped_steps = state.cache.skipped_steps
            output.cache_settings = state.cache.settings
        output.stage_durations = {
            "queue_s": state.started - entry.arrived,
            "encode_and_denoise_s": state.denoising,
            "decode_s": max(0.0, now - state.started - state.denoising),
        }
    output.peak_memory_mb = _peak_memory_mb()
    if isinstance(event, Failed):
        output.error = event.error
        return output
    kind, result = next(iter(event.output.items()))  # a pipeline's output is an ordered dict: images, or frames
    if entry.arguments.get("output_type") == "latent":
        with torch.inference_mode(False):  # the caller may want to train on it
            output.latents = result.clone()
    elif kind == "frames":
        output.videos, output.fps = list(result), entry.fps
    else:
        output.images = list(result)
    return output


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
