"""The engine: composes scheduler and worker. The loop is `step`."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from vllm_omni.diffusion.cache.settings import Choice
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.diffusion.scheduler import StepScheduler
from vllm_omni.diffusion.worker.coroutine import Failed, Finished
from vllm_omni.diffusion.worker.runner import RequestState
from vllm_omni.diffusion.worker.runner import DiffusionWorker
from vllm_omni.errors import EngineClosedError, InvalidValueError, NumericalError, RequestAbortedError
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
    text_tokens: int = 0
    calls: int = 0  # denoiser calls made for it; more than its steps where guidance needs two

    @property
    def pixels(self) -> int:
        """Of one picture; 0 where only the pipeline knows."""
        return (self.arguments.get("height") or 0) * (self.arguments.get("width") or 0)


@dataclass(frozen=True)
class StepReport:
    """What the last `step` did: one forward of `rows` (0: text encoders or decoders ran) and its seconds; how many
    requests got their picture, and the seconds that these have spent in encoding and decoding, all in all."""

    pixels: int = 0
    rows: int = 0
    skipped: bool = False
    forward_s: float = 0.0
    ended: int = 0
    ends_s: float = 0.0


@dataclass(frozen=True)
class RemainingWork:
    """What a request still needs: rows of a forward that compute, and that skip; exact once its plan is made."""

    request_id: str
    pixels: int
    begun: bool
    cached: bool
    computed: float
    skipped: float


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
        self.last = StepReport()

    def add_request(self, request: OmniDiffusionRequest, priority: int = 0, arrived: float | None = None) -> None:
        """Queue a request. Everything that can be refused is refused here, and costs nobody else anything.

        Lower `priority` runs earlier; `arrived` (``time.monotonic()``) is when the waiting began, now if None.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if not request.request_id or request.request_id in self._entries:
            raise InvalidValueError("request_id", request.request_id, "must be new and not empty")
        arguments, choice = self.worker.check(request)
        self._entries[request.request_id] = _Entry(request, arguments, choice, fps=self.worker.fps(request))
        self.scheduler.add(request.request_id, priority, time.monotonic() if arrived is None else arrived)

    def step(self) -> list[OmniRequestOutput]:
        """Admit, run one batch, and return the requests that ended."""
        with torch.inference_mode():
            for request_id in self.scheduler.admit():
                self._start(self._entries[request_id])
            entries = [self._entries[request_id] for request_id in self.scheduler.schedule()]
            batch = [entry.state for entry in entries if entry.state is not None]
            self.last = self._run(entries[0].pixels, batch) if batch else StepReport()
            for entry, state in zip(entries, batch, strict=True):
                entry.calls += self.last.rows > 0
                self._settle(state)
        return self.collect()

    def _run(self, pixels: int, batch: Sequence[RequestState]) -> StepReport:
        rows, skipped = sum(state.rows for state in batch), batch[0].turn is StepKind.SKIP
        began, decoded = time.perf_counter(), sum(state.decoding for state in batch)
        self.worker.run(batch)
        seconds = time.perf_counter() - began + decoded - sum(state.decoding for state in batch)
        ends = [state.encoding + state.decoding for state in batch if isinstance(state.event, Finished)]
        return StepReport(pixels, rows, skipped, seconds, len(ends), sum(ends))

    def collect(self) -> list[OmniRequestOutput]:
        """The requests that ended since they were last asked for; aborted ones end without a step."""
        ended, self._ended = self._ended, []
        return ended

    def abort(self, request_ids: Sequence[str], reason: Exception | None = None) -> None:
        """End requests between two steps; each still gives an output, whose error says so. Unknown ids are ignored.

        `reason` is that error, RequestAbortedError if None.
        """
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is None:
                continue
            error = reason or RequestAbortedError(f"request {request_id} was aborted")
            if entry.state is None:
                self._end(entry, Failed(error))
            else:
                with torch.inference_mode():
                    self.worker.abort(entry.state, error)
                self._settle(entry.state)

    def has_unfinished_requests(self) -> bool:
        return bool(self._entries) or bool(self._ended)

    def stage(self, request_id: str) -> str | None:
        """Where a request is between two steps: "queued", "encode" (not denoised yet), "denoise" or "decode".

        None: it has ended.
        """
        if (entry := self._entries.get(request_id)) is None:
            return None
        if entry.state is None:
            return "queued"
        if not entry.calls:
            return "encode"
        return "decode" if entry.state.turn is StepKind.COMPONENT else "denoise"

    def remaining_work(self) -> list[RemainingWork]:
        """What every unfinished request still needs."""
        return [_outlook(entry) for entry in self._entries.values()]

    def progress_steps(self) -> tuple[int, int]:
        """Steps computed and skipped by those that run, so far."""
        states = [entry.state for entry in self._entries.values() if entry.state is not None]
        skipped = sum(state.cache.skipped_steps for state in states if state.cache is not None)
        return sum(len(state.computed) for state in states), skipped

    def progress(self, previews_only: bool = False) -> list[OmniRequestOutput]:
        """Where every admitted request stands, or those alone that have a new preview, which comes once."""
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
            if entry.state is not None and (entry.state.preview or not previews_only)
        ]

    def close(self) -> None:
        """Abort what runs, and leave the pipeline as it was."""
        if not self._closed:
            self.abort(list(self._entries))
            self._ended.clear()
            self.worker.close()
            self._closed = True

    def _start(self, entry: _Entry) -> None:
        entry.text_tokens = self.worker.text_tokens(entry.arguments)
        entry.state, entry.seed = self.worker.start(entry.request, entry.arguments, entry.choice)
        self._settle(entry.state)

    def _settle(self, state: RequestState) -> None:
        """A request that has just advanced either parked again or ended."""
        if isinstance(state.event, Finished | Failed):
            self._end(self._entries[state.request_id], state.event)
        else:
            self.scheduler.park(state.request_id, state.key, state.turn)

    def _end(self, entry: _Entry, event: Finished | Failed) -> None:
        del self._entries[entry.request.request_id]
        self.scheduler.remove(entry.request.request_id)
        self._ended.append(_output(entry, event))


def _outlook(entry: _Entry) -> RemainingWork:
    state, config = entry.state, entry.choice[1] if entry.choice is not None else None
    rows = entry.arguments.get("num_images_per_prompt") or 1
    steps = entry.arguments.get("num_inference_steps") or 50  # what most pipelines take unless told
    done = 0
    if state is not None:
        steps, done, rows = state.steps or steps, state.step, state.rows or rows
        rows *= max(1.0, entry.calls / max(1, done)) if done > 1 else 1.0
    if state is not None and state.plan is not None:
        computed = sum(state.plan[done:])
    else:
        computed = steps - done
        if config is not None and config.promise:
            share = config.nfe / steps if config.nfe is not None else 1 / (config.speedup or 1.0)
            computed = round(computed * min(1.0, share))
    skipped = steps - done - computed
    return RemainingWork(
        entry.request.request_id, entry.pixels, state is not None, config is not None, computed * rows, skipped * rows
    )


def _output(entry: _Entry, event: Finished | Failed) -> OmniRequestOutput:
    now = time.perf_counter()
    output = OmniRequestOutput(entry.request.request_id, entry.request.prompt, seed=entry.seed)
    output.metrics = {"total_s": now - entry.arrived, "text_tokens": entry.text_tokens}
    if (state := entry.state) is not None:
        output.num_inference_steps = state.steps
        output.step = (state.steps or 0) if isinstance(event, Finished) else state.step
        output.computed_steps, output.plan = len(state.computed), state.plan
        if state.cache is not None:
            output.computed_steps = state.cache.computed_steps
            output.skipped_steps = state.cache.skipped_steps
            output.cache_settings = state.cache.settings
        output.stage_durations = {
            "queue_s": state.started - entry.arrived,
            "encode_and_denoise_s": state.denoising,
            "decode_s": state.decoding,
        }
    output.peak_memory_mb = _peak_memory_mb()
    if isinstance(event, Failed):
        output.error = event.error
        return output
    kind, result = next(iter(event.output.items()))  # a pipeline's output is an ordered dict: images, or frames
    if isinstance(result, torch.Tensor | numpy.ndarray) and not torch.as_tensor(result).isfinite().all():
        output.error = NumericalError()  # pictures are looked at where they are made
        return output
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
