"""What a request returns. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_omni.errors import OmniError


@dataclass
class OmniRequestOutput:
    """The images, videos (each a list of frames to be shown at `fps`) or sounds of one request, and how they were made.

    `audio` has one waveform per picture or prompt, (channels, samples) at `audio_rate` samples per second; a video with
    sound has both.
    `plan` has one flag per step, True where the blocks were to be computed; `computed_steps` and `skipped_steps` count
    what was done. With `finished` False it is a progress report: `step` of `num_inference_steps`, and no
    images but previews that were asked for.
    """

    request_id: str
    prompt: Any = None
    images: list[Any] = field(default_factory=list)
    videos: list[list[Any]] = field(default_factory=list)
    fps: float | None = None
    audio: list[Any] = field(default_factory=list)
    audio_rate: int | None = None
    latents: Any = None
    error: Exception | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    stage_durations: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    finished: bool = True
    seed: int | None = None
    step: int = 0
    num_inference_steps: int | None = None
    computed_steps: int = 0
    skipped_steps: int = 0
    plan: tuple[bool, ...] | None = None
    cache_settings: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """True if the request ended with its images."""
        return self.finished and self.error is None

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def final_output_type(self) -> str:
        """What the request made: "image", "video", "audio", "latents", or "none" if it failed or is not finished."""
        made = {"video": self.videos, "image": self.images, "audio": self.audio}
        found = next((name for name, values in made.items() if len(values)), None)
        return found or ("none" if self.latents is None else "latents")

    @property
    def error_type(self) -> str | None:
        """The class of the error."""
        return None if self.error is None else type(self.error).__name__

    def to_dict(self) -> dict[str, Any]:
        """Every field, and what is read from them; the error as its text."""
        told = vars(self) | {"error": None if self.error is None else str(self.error), "error_type": self.error_type}
        return told | {"num_images": self.num_images, "final_output_type": self.final_output_type}

    def __getstate__(self) -> dict[str, Any]:
        """Everything, for a copy or a pickle; an error that may not survive either as the text that it shows."""
        return vars(self) | {"error": _that_copies(self.error)}


def _that_copies(error: Exception | None) -> Exception | None:
    if error is None or isinstance(error, OmniError):
        return error
    plain = all(isinstance(value, str | bytes | int | float | None) for value in error.args)
    if type(error).__module__ == "builtins" and plain and not vars(error):
        return error
    return OmniError(f"{type(error).__name__}: {error}")
