"""Pictures in, videos out: through `Omni`, through files and through the command."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, levels_apart
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline
from errors_raised import assert_matches
from hostile import progressive
from PIL import Image
from pipelines import CURVE, DEMO, count_blocks, tiny_wan

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import InvalidValueError
from vllm_omni.outputs.media import IMAGE_FORMATS, MAX_SCANS, announced, encode_video, open_image, save_video

VIDEO = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 10, "guidance_scale": 3.0}


# ---------------------------------------------------------------------------------------------------------- pictures in


@pytest.fixture(scope="module")
def image_to_image() -> Any:
    demo = DiffusionPipeline.from_pretrained(DEMO, dtype=torch.float32, use_safetensors=True)
    demo.set_progress_bar_config(disable=True)
    return FluxImg2ImgPipeline(**demo.components)


@pytest.mark.slow
def test_an_edit_equals_that_of_plain_diffusers(image_to_image: Any) -> None:
    """Image to image enters the schedule part-way: mixed strengths side by side, each as plain diffusers makes it."""
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "navy", "white")]
    strengths = [0.4, 0.8, 1.0]
    call = {"num_inference_steps": 10, "output_type": "latent", "height": 64, "width": 64}
    plain = [
        image_to_image(
            "red apple", image=picture, strength=s, generator=torch.Generator("cpu").manual_seed(i), **call
        ).images
        for i, (picture, s) in enumerate(zip(pictures, strengths, strict=True))
    ]
    with Omni.from_pipe(image_to_image, cache_backend="magcache") as omni:
        prompts = [{"prompt": "red apple", "multi_modal_data": {"image": picture}} for picture in pictures]
        off = [Params(seed=i, strength=s, cache="off", **call) for i, s in enumerate(strengths)]
        for output, wanted in zip(omni.generate(prompts, off, use_tqdm=False), plain, strict=True):
            assert output.ok, output.error
            assert_close(output.latents, wanted)
        counter = count_blocks(image_to_image)
        on = [Params(seed=i, strength=s, **call) for i, s in enumerate(strengths)]
        cached = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, on, strict=True)]
        counter.remove()
    assert [output.num_inference_steps for output in cached] == [4, 8, 10]
    assert [output.computed_steps + output.skipped_steps for output in cached] == [4, 8, 10]
    assert counter.count == sum(output.computed_steps for output in cached) < 22


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/etc/passwd", "image must be a picture, not where to find one"),
        (["http://x/y.png"], "image must be a picture"),
        (b"\x89PNG", "image must be a picture"),
    ],
)
def test_a_path_or_an_address_is_refused_as_an_image(image_to_image: Any, image: Any, message: str) -> None:
    with Omni.from_pipe(image_to_image) as omni:
        prompt = {"prompt": "red apple", "multi_modal_data": {"image": image}}
        assert_matches(omni.generate(prompt, use_tqdm=False)[0].error, message)


def _png(size: tuple[int, int], cut: int | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()[:cut]


def test_open_image_decodes_and_applies_the_orientation(tmp_path: Path) -> None:
    assert open_image(_png((5, 3))).size == (5, 3)
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("L", (8, 4)).save(file, exif=exif)
    picture = open_image(file)
    assert picture.size == (4, 8) and picture.mode == "RGB"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes"),
        (b"GIF89a" + b"\0" * 40, "PNG, JPEG or WebP"),
        (_png((64, 64), 60), "whole PNG"),
        (_png((200, 200)), "at most 10000 pixels"),
        (Path("gone.png"), "must be a file that exists"),
    ],
)
def test_open_image_refuses_what_is_no_image(source: Any, message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        open_image(source, max_pixels=10_000)
    assert_matches(caught.value, message)


def test_scans_are_counted_in_a_jpeg_of_several_pictures_too() -> None:
    """An MP header makes it another format for Pillow, with the same decoder."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    several, many = buffer.getvalue(), progressive(64, MAX_SCANS + 1)
    begin = several.index(b"MPF\0") - 4
    header = several[begin : begin + 2 + int.from_bytes(several[begin + 2 : begin + 4], "big")]
    bomb = many[:2] + header + many[2:]
    assert Image.open(io.BytesIO(bomb), formats=IMAGE_FORMATS).format == "MPO"
    for data in (many, bomb):
        with pytest.raises(InvalidValueError, match=f"must have at most {MAX_SCANS}, as a JPEG"):
            announced(data, "image")


# ----------------------------------------------------------------------------------------------------------- videos out


@pytest.fixture(scope="module")
def wan() -> Iterator[Omni]:
    with Omni.from_pipe(tiny_wan(), cache_backend="magcache", cache_config={"mag_ratios": CURVE}) as omni:
        yield omni


def test_videos_of_mixed_lengths_equal_those_of_plain_diffusers(wan: Omni) -> None:
    prompts, frames = ["red apple", "a rocket", "one more"], [9, 5, 9]
    parameters = [
        Params(**VIDEO | {"num_frames": n, "num_inference_steps": 4 + i}, seed=i, cache="off")
        for i, n in enumerate(frames)
    ]
    outputs = wan.generate(prompts, parameters, use_tqdm=False)
    plain = tiny_wan()
    for i, output in enumerate(outputs):
        assert output.ok, output.error
        assert output.images == [] and output.fps == 16.0
        (video,) = output.videos
        assert [frame.size for frame in video] == [(32, 32)] * frames[i]
        call = VIDEO | {"num_frames": frames[i], "num_inference_steps": 4 + i, "output_type": "pil"}
        (wanted,) = plain(prompts[i], generator=torch.Generator("cpu").manual_seed(i), **call).frames
        for frame, other in zip(video, wanted, strict=True):
            assert levels_apart(frame, other) <= 1


def test_a_video_skips_steps_and_frees_its_memory(wan: Omni) -> None:
    output = wan.generate("red apple", Params(**VIDEO, seed=0), use_tqdm=False)[0]
    assert output.ok and output.skipped_steps > 0 and output.fps == 16
    assert wan.engine.worker.cache_bytes == 0


def _frames(count: int = 6, size: tuple[int, int] = (32, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * i, 255 - 40 * i, 90)) for i in range(count)]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_a_video_file_holds_its_frames(tmp_path: Path, suffix: str) -> None:
    import imageio.v3 as imageio

    path = tmp_path / f"video.{suffix}"
    frames = _frames()
    save_video(frames, path, fps=10)
    stored = imageio.imread(path, plugin="FFMPEG") if suffix == "mp4" else np.stack(list(imageio.imiter(path)))
    assert stored.shape == (6, 48, 32, 3)
    for array, frame in zip(stored, frames, strict=True):
        assert np.abs(array.astype(int) - np.asarray(frame).astype(int)).mean() < 8
    if suffix == "mp4":
        meta = imageio.immeta(path, plugin="FFMPEG")
        assert meta["fps"] == 10 and meta["codec"] == "h264"
    else:
        picture = Image.open(path)
        picture.load()  # WebP tells a frame's duration with the frame
        assert picture.info["duration"] == 100


@pytest.mark.parametrize(
    ("suffix", "fps", "seconds"),
    [("gif", 24, 2.0), ("gif", 30, 1.6), ("gif", 16, 3.0), ("gif", 60, 0.96), ("webp", 24, 2.0)],
)
def test_a_video_file_is_as_long_as_its_frames(tmp_path: Path, suffix: str, fps: float, seconds: float) -> None:
    """48 of them; no frame of a GIF is shorter than players allow."""
    path = tmp_path / f"video.{suffix}"
    save_video([Image.new("RGB", (8, 8), (5 * i, 0, 0)) for i in range(48)], path, fps)
    shown = []
    with Image.open(path) as picture:
        for place in range(picture.n_frames):
            picture.seek(place)
            picture.load()
            shown.append(picture.info["duration"])
    assert len(shown) == 48 and min(shown) >= (20 if suffix == "gif" else 1)
    assert sum(shown) == 1000 * seconds


@pytest.mark.parametrize("fps", [0, 1e9, float("nan"), "8", None, True])
def test_a_video_of_no_sane_rate_is_refused(fps: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="fps must be a number from 1 to 240"):
        save_video([Image.new("RGB", (8, 8))] * 2, str(tmp_path / "clip.mp4"), fps)
    assert not [*tmp_path.iterdir()]


def test_bad_videos_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="mp4, gif, webp"):
        encode_video(_frames(), "avi", 8)
    with pytest.raises(InvalidValueError, match="frames"):
        encode_video([], "gif", 8)


# ---------------------------------------------------------------------------------------------------------- the command


def test_generate_writes_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wan().save_pretrained(tmp_path / "wan")
    command = ["generate", str(tmp_path / "wan"), "red apple", "--steps", "3", "--size", "32x32", "--num-frames", "5"]
    command += ["--fps", "8", "--video-format", "gif", "--out", str(tmp_path / "out"), "--seed", "1"]
    assert main(command) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "000-red-apple.gif" and file.name in capsys.readouterr().out
    picture = Image.open(file)
    assert picture.n_frames == 5 and picture.info["duration"] == 120  # a GIF counts centiseconds


@pytest.mark.slow
def test_generate_edits_a_picture(image_to_image: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_to_image.save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    command = ["generate", str(tmp_path / "model"), "banana", "--steps", "4", "--strength", "0.75", "--seed", "1"]
    assert main([*command, "--image", str(tmp_path / "in.png"), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert Image.open(file).size[0] >= 64
    assert main([*command, "--image", str(tmp_path / "none.png")]) == 2
    assert "--image must be a file that exists" in capsys.readouterr().err
