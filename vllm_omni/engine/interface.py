"""The interface between a front end and an engine, wherever that runs. Knows no tensors, no HTTP and no sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput

MAX_QUEUED_REQUESTS = 256  # may wait, unless the operator says otherwise


@dataclass(frozen=True)
class PictureInput:
    """An argument of the pipeline that takes a picture."""

    needed: bool  # False if the model also works without it
    several: bool  # True if a list is several pictures for one request


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model: enough to validate a request, and to describe the model, without asking the engine again."""

    name: str  # as given on the command line; never a path that a client should see
    pipeline: str  # class of the diffusers pipeline
    denoisers: dict[str, str]  # attribute of the pipeline -> class name
    defaults: dict[str, Any]  # steps, height, width, guidance_scale, ... if the model defines them
    parameters: tuple[str, ...]  # names that the pipeline's call takes
    size_multiple: int  # height and width must be multiples of it, in pixels
    tokens_per_pixel: float  # latent tokens of a picture ÷ its pixels: for `usage`
    cache: dict[str, Any]  # backend, its settings, the profiles in use, the presets by name
    previews: bool  # True if partial images can be made
    pictures: dict[str, PictureInput]  # by the pipeline's argument: image, mask_image, control_image, ...
    video_output: bool = False
    sound_output: bool = False  # True if it makes sound alone
    fps: float = 16.0  # frames per second that the model's videos are made for
    frame_multiple: int = 1  # a video has a multiple of it plus one frames: what the VAE packs into one

    def with_profiles(self, names: Sequence[str]) -> ModelInfo:
        """The same with the cache profiles that are in use by now: some are learnt while it serves."""
        if self.cache.get("profiles") == [*names]:
            return self
        return replace(self, cache=self.cache | {"profiles": [*names]})

    @property
    def output(self) -> Literal["image", "video", "sound"]:
        return "video" if self.video_output else "sound" if self.sound_output else "image"


@dataclass(frozen=True)
class EngineCondition:
    """What can be changed of a loaded engine; a process that replaces another is brought to the same condition."""

    adapters: dict[str, str] = field(default_factory=dict)  # name -> where it was loaded from
    weights: dict[str, str] = field(default_factory=dict)  # component -> the folder of its last update, the latest last
    asleep: int = 0  # the level of sleep; 0: awake
    profiling: bool = False


@dataclass(frozen=True)
class EngineLoad:
    """What an engine still has to do: seconds left, if it had the engine to itself, and pixels, of each request.

    In company, a row of a forward costs `unshared` of what it costs by itself.
    """

    jobs: tuple[tuple[float, int], ...] = ()
    unshared: float = 1.0


@dataclass(frozen=True)
class ReplicaStats:
    """One of several engines behind one front."""

    name: str
    state: str  # "ready" | "asleep" | "behind" (not yet in the condition of the others) | "starting" | "dead"
    running: int = 0
    waiting: int = 0
    queued_cost_s: float = 0.0
    answered: int = 0  # requests that ended there, however they did
    lost: int = 0  # that its process took with it, and that another was asked
    restarts: int = 0
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine started, and gauges of this moment; histograms as {bucket bound: count}."""

    running: int = 0
    waiting: int = 0
    max_num_seqs: int = 0
    steps_computed: int = 0
    steps_skipped: int = 0
    forwards_computed: int = 0
    forwards_skipped: int = 0
    requests: dict[str, int] = field(default_factory=dict)  # "finished" | "failed" | "aborted" | "expired" -> count
    aborts_by_stage: dict[str, int] = field(default_factory=dict)  # "queued" | "encode" | "denoise" | "decode"
    batch_sizes: dict[int, int] = field(default_factory=dict)  # rows of a forward -> how many forwards
    cache_bytes: int = 0
    prompt_hits: int = 0  # prompts whose embeddings were there
    prompt_misses: int = 0
    prompt_bytes: int = 0
    queue_wait_s: float = 0.0  # summed over started requests
    denoise_s: float = 0.0
    decode_s: float = 0.0
    queued_cost_s: float = 0.0  # planned seconds of all that waits or runs
    restarts: int = 0
    denoisers: dict[str, dict[str, Any]] = field(default_factory=dict)  # what is known of each, in plain values
    profiles: tuple[str, ...] = ()  # of the checkpoint, in use now
    learning: str = ""  # what is being learnt of the checkpoint, in words
    recent: tuple[dict[str, Any], ...] = ()  # the last requests: steps, computed, skipped, settings; no prompts
    replicas: tuple[ReplicaStats, ...] = ()  # of several engines; empty: it is one


class EngineClient(Protocol):
    """The asynchronous engine as a server sees it. All methods belong to one event loop."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model; the engine must have started."""

    @property
    def condition(self) -> EngineCondition:
        """Its adapters, weights and sleep, as last reported."""

    @property
    def ready(self) -> bool:
        """True while requests can be served: loaded, warmed up, alive, and not draining."""

    def generate(
        self,
        prompt: Any,
        sampling_params: OmniDiffusionSamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> AsyncIterator[OmniRequestOutput]:
        """Progress reports, then the finished output or its `.error`; leaving the iterator aborts within one step.

        Lower `priority` runs earlier; waiting requests age, so none starves. Requests of one `salt` alone share the
        embeddings of equal prompts. Raises before any work is done:
        InvalidValueError, QueueFullError (with `retry_after_s`), EngineDeadError, EngineDrainingError.
        An output's error may be DeadlineExceededError, RequestAbortedError, EngineDeadError or what the model raised.
        """

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests within one step, each with an output whose error says so. Unknown ids are ignored."""

    async def control(self, action: Any) -> EngineCondition:
        """Have an action of `wire.py` done between two steps; returns the condition after it.

        Raises InvalidValueError, ModelLoadError or ConflictError, with nothing changed.
        """

    async def check_health(self) -> None:
        """Raise EngineDeadError unless the engine answers within a few seconds."""

    async def stats(self) -> EngineStats:
        """Counters since the start, whatever restarts there were, and gauges as of the last report; cheap."""

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, and return when none is left or `timeout_s` is over."""

    async def shutdown(self) -> None:
        """Abort what runs; end the engine; leave no process and no socket file."""
