"""What a pipeline returned, as the pictures, clips, sounds or latents of a request. Knows pipelines by what they name.

A pipeline returns an ordered dict: of images, of frames, of one video, of sound, or of clips with sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from vllm_omni.errors import NumericalError
from vllm_omni.outputs import OmniRequestOutput

_SOUNDS = ("audios", "audio")


def fill(output: OmniRequestOutput, made: Mapping[str, Any], latent: bool, fps: float, audio_rate: int | None) -> None:
    """Put what the pipeline `made` in its place; an error if any of it is no number."""
    kind, first = next(iter(made.items()))
    if any(_has_nan(value) for value in made.values()):
        output.error = NumericalError()  # pictures are looked at where they are made
        return
    if latent:
        with torch.inference_mode(False):  # the caller may want to train on it
            output.latents = [each.clone() for each in first] if isinstance(first, list) else first.clone()
        return
    sounds = [each for name in _SOUNDS if made.get(name) is not None for each in made[name]]
    if made.get("sound") is not None:  # of the one video of Cosmos 3
        sounds.append(made["sound"])
    if sounds:
        output.audio, output.audio_rate = [_channels(each) for each in sounds], audio_rate
    if kind in ("frames", "video"):
        output.videos, output.fps = list(first) if kind == "frames" else [first], fps
    elif kind not in _SOUNDS:  # a picture of layers is a list of its own
        output.images = [one for each in first for one in (each if isinstance(each, list) else [each])]


def values(output: OmniRequestOutput) -> torch.Tensor:
    """The first picture or clip, from 0 to 1, or the first sound over its own peak, for one may be quiet; in fp32.

    So that decibels mean the same of each: a mean square that is to be compared with 1.
    """
    made: Sequence[Any] = output.images or output.videos or output.audio
    shown = torch.as_tensor(numpy.asarray(made[0], dtype=numpy.float32))
    quiet = not output.images and not output.videos
    return shown / shown.abs().amax().clamp(min=1e-6) if quiet else shown


def _channels(sound: Any) -> Any:
    """A waveform as (channels, samples): some pipelines leave the channel out where there is one."""
    return sound[None] if sound.ndim == 1 else sound


def _has_nan(value: Any) -> bool:
    return isinstance(value, torch.Tensor | numpy.ndarray) and not torch.as_tensor(value).isfinite().all()
