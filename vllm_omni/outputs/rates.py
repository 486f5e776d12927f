"""The pace at which a model's videos and sounds were made, read from its pipeline. Knows no engine."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import MAX_FPS

# The frame rate that a family was trained at, by the beginning of its pipeline's name; of several the first
# (the models' own cards, and the examples of diffusers).
_FRAME_RATES = {
    "Allegro": 15, "CogVideoX": 8, "ConsisID": 8, "Cosmos2_5_Transfer": 30, "EasyAnimate": 8, "Helios": 24,
    "HunyuanSkyreels": 24, "HunyuanVideoFramepack": 30, "HunyuanVideo": 24, "Kandinsky": 24, "Lucy": 24,
    "MiniMaxH3": 24, "Mochi": 30, "Motif": 24, "SkyReels": 24, "WanAnimate": 30,
}  # fmt: skip


class Rates:
    """Of one pipeline: frames per second, and samples per second of its sound; None without sound."""

    def __init__(self, pipeline: Any, taken: Mapping[str, inspect.Parameter], defaults: Mapping[str, Any]) -> None:
        """`taken`: what its call takes. `defaults` are the model's; those that a call must be told are `defaults`."""
        self._argument = next((name for name in ("frame_rate", "fps") if name in taken), "")  # that the model is told
        self._factor = 2 if type(pipeline).__name__ == "LTX2DFRTemporalRefinePipeline" else 1  # told of what comes in
        own = taken[self._argument].default if self._argument else None
        own = own if isinstance(own, int | float) else frame_rate_of(pipeline)
        given = defaults.get(self._argument) if self._argument else None
        self.fps = float(given or defaults.get("fps") or own)  # unless a request differs
        self.defaults = {self._argument: self.fps} if self._argument and self.fps != own else {}
        self.audio_rate = audio_rate_of(pipeline)

    def asked(self, fps: float | None, given: Mapping[str, Any]) -> dict[str, float]:
        """What a call must be told of a request for `fps`; InvalidValueError if the model has another pace."""
        if fps is not None and self._argument:  # the model is conditioned on it
            if (told := given.get(self._argument, fps)) != fps:
                raise InvalidValueError("fps", fps, f"must be the {self._argument}, which is {told}; give one of them")
            return {self._argument: fps}
        if fps not in (None, self.fps) and self.audio_rate is not None:
            raise InvalidValueError("fps", fps, f"must be {self.fps:g}: this model's sound has no other pace")
        return {}

    def of(self, fps: float | None, arguments: Mapping[str, Any]) -> float:
        """Frames per second of the video that `arguments` made, of a request for `fps`."""
        told = arguments.get(self._argument) if self._argument else fps
        return float(told or self.fps) * self._factor

    def check(self, arguments: Mapping[str, Any]) -> None:
        """InvalidValueError for a rate that is none."""
        rate = arguments.get(self._argument)
        if rate is not None and not (isinstance(rate, int | float) and 1 <= rate <= MAX_FPS):
            raise InvalidValueError(self._argument, rate, f"must be a number from 1 to {MAX_FPS}, of frames per second")


def frame_rate_of(pipeline: Any) -> float:
    """Frames per second of the pipeline's videos, where its call takes none."""
    name, denoiser = type(pipeline).__name__, vars(pipeline).get("transformer")
    if pipeline.config.get("expand_timesteps"):  # Wan2.2-TI2V-5B
        return 24
    if name.startswith("CogVideoX") and denoiser is not None and denoiser.config.get("patch_size_t"):  # 1.5
        return 16
    return next((rate for start, rate in _FRAME_RATES.items() if name.startswith(start)), 16)


def audio_rate_of(pipeline: Any) -> int | None:
    """Samples per second of the pipeline's sound: of its vocoder, or of the VAE that makes it; None without sound."""
    for name in ("vocoder", "vae", "audio_vae", "sound_tokenizer"):
        config = getattr(getattr(pipeline, name, None), "config", {})
        for field in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            if isinstance(rate := config.get(field), int):
                return rate
    return None
