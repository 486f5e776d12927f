"""Sound as files: WAV, by Python itself, and FLAC, by imageio's ffmpeg; 16 bits. Knows no engine.

A waveform is (channels, samples) between -1 and 1, as a tensor or an array; what is beyond is cut off.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np

from vllm_omni.errors import InvalidValueError

SOUND_FORMATS = ("wav", "flac")
BY_FFMPEG = {
    "mp4": "gif",
    "flac": "wav",
}  # formats of clips and sounds that need it, and one for the same that does not


def encode_sound(waveform: Any, format: str, rate: int) -> bytes:
    """The file's bytes; `rate` in samples per second."""
    if format not in SOUND_FORMATS:
        raise InvalidValueError("format", format, f"must be one of: {', '.join(SOUND_FORMATS)}")
    channels = np.atleast_2d(waveform.detach().cpu().float().numpy() if hasattr(waveform, "detach") else waveform)
    if not channels.size:
        raise InvalidValueError("waveform", channels.shape, "must be at least one sample")
    samples = np.rint(np.clip(np.nan_to_num(channels), -1, 1) * (2**15 - 1)).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.tobytes())
    return buffer.getvalue() if format == "wav" else _flac(buffer.getvalue())


def save_sound(waveform: Any, path: Path, rate: int) -> None:
    """Write `path`; its suffix is the format."""
    path.write_bytes(encode_sound(waveform, path.suffix.removeprefix(".").lower(), rate))


def ffmpeg_for(format: str) -> str:
    """imageio's ffmpeg, which makes files of `format`, one of BY_FFMPEG. InvalidValueError without it."""
    try:
        import imageio.v2  # noqa: F401
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        need = "needs imageio and imageio-ffmpeg (pip install 'vllm-omni-magcache[video]')"
        raise InvalidValueError("format", format, f"{need}; or use {BY_FFMPEG[format]}") from None


def _flac(wav: bytes) -> bytes:
    ffmpeg = ffmpeg_for("flac")
    with tempfile.TemporaryDirectory(prefix="vllm-omni-") as folder:  # the header is written by seeking back
        source, made = Path(folder) / "sound.wav", Path(folder) / "sound.flac"
        source.write_bytes(wav)
        command = [ffmpeg, "-loglevel", "error", "-i", str(source), str(made)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return made.read_bytes()
