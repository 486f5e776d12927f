"""The pace at which a model's videos and sounds were made, read from its pipeline. Knows no engine."""

from __future__ import annotations

from typing import Any

# The frame rate that a family was trained at, by the beginning of its pipeline's name; of several the first
# (the models' own cards, and the examples of diffusers).
_FRAME_RATES = {
    "Allegro": 15, "CogVideoX": 8, "ConsisID": 8, "Cosmos2_5_Transfer": 30, "EasyAnimate": 8, "Helios": 24,
    "HunyuanSkyreels": 24, "HunyuanVideoFramepack": 30, "HunyuanVideo": 24, "Kandinsky": 24, "Lucy": 24,
    "MiniMaxH3": 24, "Mochi": 30, "Motif": 24, "SkyReels": 24, "WanAnimate": 30,
}  # fmt: skip


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
