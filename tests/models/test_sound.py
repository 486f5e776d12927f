"""Sound reaches the user: beside a clip or alone, as waveforms, as files, and over HTTP."""

from __future__ import annotations

import io
import json
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers as d
import httpx
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from closeness import assert_close
from http_server import Running, serve
from PIL import Image
from waiting import until
from zoo_sound import LTX_GUIDANCE, LTX_TEXT, RATE, SECOND, cosmos3, ltx2, stable_audio

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import InvalidValueError
from vllm_omni.outputs.media import encode_video
from vllm_omni.outputs.sound import encode_sound

SIZE = {"height": 32, "width": 32, "num_frames": 5}
GUIDANCE = LTX_GUIDANCE
GENERATE = "/v1/audio/generate"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ltx2()


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny Stable Audio: 0.032 s at most."""
    folder = tmp_path_factory.mktemp("models") / "sounds"
    stable_audio().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(sounds: Path) -> Iterator[Running]:
    with serve({"model": str(sounds), "max_num_seqs": 4}) as running:
        yield running


def pcm(wav: bytes) -> tuple[np.ndarray, int]:
    """(channels, samples) and the rate."""
    with wave.open(io.BytesIO(wav)) as file:
        assert file.getsampwidth() == 2
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return data.reshape(-1, file.getnchannels()).T, file.getframerate()


def prompt(i: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return {
        "prompt_embeds": torch.randn(1, 8, LTX_TEXT * 2, generator=generator),
        "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long),
    }


def test_video_and_sound_are_what_diffusers_makes(pipe: Any) -> None:
    counts = [6, 4]
    plain = []
    for i, steps in enumerate(counts):
        call = dict(guidance_scale=1.0, frame_rate=25.0, num_inference_steps=steps, output_type="np")
        generator = torch.Generator().manual_seed(i)
        plain.append(pipe(**prompt(i), **SIZE, **GUIDANCE, **call, generator=generator))
    params = [
        Params(
            num_inference_steps=n, seed=i, output_type="np", guidance_scale=1.0, fps=25.0, extra_args=GUIDANCE, **SIZE
        )
        for i, n in enumerate(counts)
    ]
    with Omni.from_pipe(pipe) as omni:
        outputs = omni.generate([prompt(0), prompt(1)], params, use_tqdm=False)
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert output.computed_steps == output.num_inference_steps and output.skipped_steps == 0
        assert_close(output.videos[0], wanted.frames[0])
        sound, expected = torch.as_tensor(output.audio[0]), torch.as_tensor(wanted.audio[0])
        assert (sound - expected).norm() <= 1e-4 * expected.norm()
        assert expected.norm() > 0 and output.audio_rate == RATE and output.fps == 25.0
    assert type(pipe.scheduler) is d.FlowMatchEulerDiscreteScheduler


def test_a_waveform_becomes_a_file() -> None:
    tone = torch.sin(torch.arange(RATE) / 8)
    stereo = torch.stack([tone, 2 * tone])  # the second is cut off at 1
    made, rate = pcm(encode_sound(stereo, "wav", RATE))
    assert rate == RATE and made.shape == (2, RATE)
    np.testing.assert_allclose(made / (2**15 - 1), stereo.clamp(-1, 1), atol=2**-15)
    flac = encode_sound(stereo.numpy(), "flac", RATE)
    assert flac.startswith(b"fLaC") and len(flac) < made.nbytes
    back = pcm(decoded(flac, "flac"))[0]
    assert np.array_equal(back, made)
    with pytest.raises(InvalidValueError, match="format must be one of: wav, flac, got 'ogg'"):
        encode_sound(tone, "ogg", RATE)


def decoded(data: bytes, format: str) -> bytes:
    """The sound of a file as a WAV, by ffmpeg."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-loglevel", "error", "-f", format, "-i", "pipe:0", "-f", "wav", "pipe:1"]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def track(file: Path) -> tuple[np.ndarray, int]:
    """The sound of a clip."""
    from imageio_ffmpeg import get_ffmpeg_exe

    heard = file.with_suffix(".wav")
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", str(file), "-vn", "-y", str(heard)]
    subprocess.run(command, check=True)
    return pcm(heard.read_bytes())


def test_an_mp4_has_the_sound_of_its_clip(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]
    tone = torch.sin(torch.arange(RATE // 2) * 2 * torch.pi * 440 / RATE)[None]
    clip = encode_video(frames, "mp4", 12, tone, RATE)
    assert np.asarray(imageio.imread(clip, plugin="FFMPEG", extension=".mp4")).shape == (6, 32, 32, 3)
    (tmp_path / "clip.mp4").write_bytes(clip)
    heard, rate = track(tmp_path / "clip.mp4")
    assert rate == RATE and abs(heard.shape[1] - RATE // 2) < RATE // 10
    spectrum = np.abs(np.fft.rfft(heard[0][: RATE // 2].astype(float)))
    assert abs(np.argmax(spectrum) * RATE / min(RATE // 2, heard.shape[1]) - 440) < 5
    assert len(encode_video(frames, "mp4", 12)) < len(clip)


def test_the_command_writes_sound(sounds: Path, tmp_path: Path) -> None:
    told = ["generate", str(sounds), "a drum", "--steps", "2", "--seed", "3", "--seconds", str(SECOND / 2)]
    assert main([*told, "--out", str(tmp_path)]) == 0
    assert main([*told, "--out", str(tmp_path), "--audio-format", "flac"]) == 0
    made, rate = pcm((tmp_path / "000-a-drum.wav").read_bytes())
    assert rate == RATE and made.shape == (2, round(SECOND / 2 * RATE)) and made.any()
    assert np.array_equal(pcm(decoded((tmp_path / "000-a-drum.flac").read_bytes(), "flac"))[0], made)


def test_sound_over_http(server: Running, sounds: Path) -> None:
    asked = {"input": "a slow song", "audio_length": SECOND / 2, "num_inference_steps": 3, "seed": 11}
    asked |= {"audio_start": 0.0, "speed": 1.0}  # as vllm-omni's client always does
    reply = httpx.post(server.url + GENERATE, json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "audio/wav"
    facts = json.loads(reply.headers["x-omni"])
    assert facts["seed"] == 11 and facts["rate"] == RATE and facts["computed_steps"] == 3
    made, rate = pcm(reply.content)
    with Omni(str(sounds)) as omni:
        params = Params(num_inference_steps=3, seed=11, seconds=SECOND / 2)
        (output,) = omni.generate(["a slow song"], params, use_tqdm=False)
    assert output.audio_rate == rate == RATE
    wanted = pcm(encode_sound(output.audio[0], "wav", RATE))[0]
    assert np.abs(made.astype(int) - wanted).max() <= 1 and made.shape == wanted.shape
    flac = httpx.post(server.url + GENERATE, json={**asked, "response_format": "flac"}, timeout=60)
    assert flac.headers["content-type"] == "audio/flac"
    assert np.array_equal(pcm(decoded(flac.content, "flac"))[0], made)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt"),
        ({"input": "a", "prompt": "b"}, "input and prompt mean the same"),
        ({"input": "a", "audio_length": 1e6}, "audio_length must be at most"),
        ({"input": "a", "size": "32x32"}, "this model has no size"),
        ({"input": "a", "response_format": "mp3"}, "response_format"),
        ({"input": "a", "audio_length": 10.0}, "audio"),
        ({"input": "a", "audio_start": 0.5}, "audio_start can only be 0 here"),
        ({"input": "a", "speed": 2}, "speed can only be 1 here"),
    ],
)
def test_a_sound_that_cannot_be_made_is_refused(server: Running, body: dict[str, Any], said: str) -> None:
    reply = httpx.post(server.url + GENERATE, json=body, timeout=60)
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text


def test_other_routes_name_the_one_for_sounds(server: Running) -> None:
    for path in ("/v1/images/generations", "/v1/videos"):
        reply = httpx.post(server.url + path, json={"prompt": "a"}, timeout=60)
        assert reply.status_code == 400 and GENERATE in reply.json()["error"]["message"], reply.text
    (model,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert httpx.get(server.url + "/models").json()["task_type"] == "T2A"
    assert model["omni"]["capabilities"]["sounds"] and not model["omni"]["capabilities"]["generations"]


@pytest.mark.slow
def test_a_clip_over_http_has_its_sound(tmp_path: Path) -> None:
    """Cosmos 3 makes both of a text alone."""
    cosmos3().save_pretrained(tmp_path / "clips")
    (tmp_path / "clips" / "generation_config.json").write_text(json.dumps(SIZE | {"enable_sound": True}))
    engine = {"model": str(tmp_path / "clips")}
    asked = {"prompt": "a slow song", "size": "32x32", "num_frames": 5, "num_inference_steps": 2, "seed": 4}
    with serve(engine, warmup=False, store_dir=tmp_path / "store") as running:
        reply = httpx.post(running.url + "/v1/videos/sync", json=asked, timeout=60)
        assert reply.status_code == 200, reply.text
        job = httpx.post(running.url + "/v1/videos", json=asked, timeout=60).json()
        url = f"{running.url}/v1/videos/{job['id']}"
        until(lambda: httpx.get(url).json()["status"] not in ("queued", "in_progress"), pause_s=0.05)
        kept = httpx.get(f"{url}/content").content
    for clip in (reply.content, kept):
        (tmp_path / "clip.mp4").write_bytes(clip)
        frames = np.asarray(imageio.imread(clip, plugin="FFMPEG", extension=".mp4"))
        assert frames.shape == (5, 32, 32, 3)
        heard, rate = track(tmp_path / "clip.mp4")
        assert rate == RATE and heard.shape[0] == 2 and heard.shape[1] >= 5 / 24 * RATE
        assert np.abs(heard).max() > 0
