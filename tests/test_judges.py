"""The scenes that the judges learn from, their autoencoders, and the video model in the box."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.model_folder import ASSETS, check_folder

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "images": ROOT / "benchmarks" / "judges" / "images",
    "joint": ROOT / "benchmarks" / "judges" / "joint",
    "video": ASSETS / "demo-video",
}


def trained(name: str) -> pytest.MarkDecorator:
    """Skips while a judge's folder is not in the repository."""
    reason = "not trained yet: tools/train_judges.py, some hours"
    return pytest.mark.skipif(not FOLDERS[name].is_dir(), reason=reason)


@pytest.fixture(autouse=True)
def tools() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.pop(0)


@pytest.mark.parametrize("name", list(FOLDERS))
def test_scenes_are_a_function_of_their_number(name: str) -> None:
    from judges.scenes import DRAW

    first, again, other = DRAW[name](3, 8), DRAW[name](3, 8), DRAW[name](4, 8)
    assert torch.equal(first.pixels, again.pixels)
    assert first.captions == again.captions
    assert not torch.equal(first.pixels, other.pixels)
    assert -1 <= first.pixels.min() < first.pixels.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_caption_leaves_much_open(name: str) -> None:
    from judges.scenes import DRAW

    batch = DRAW[name](5, 768)
    by_caption: dict[str, list[torch.Tensor]] = {}
    for caption, pixels in zip(batch.captions, batch.pixels, strict=True):
        by_caption.setdefault(caption, []).append(pixels)
    pairs = [same for same in by_caption.values() if len(same) > 1]
    assert len(pairs) > 50
    distances = torch.tensor([(a - b).pow(2).mean().sqrt().item() for a, b, *_ in pairs])
    assert distances.min() > 0.05
    assert distances.mean() > 0.3


@pytest.mark.parametrize("name", list(FOLDERS))
def test_the_encoder_computes_the_projection(name: str) -> None:
    from diffusers import AutoencoderKL, AutoencoderKLWan
    from judges.latents import Basis
    from judges.scenes import DRAW
    from judges.vae import build_vae, set_clip_encoder, set_picture_encoder

    clip = name == "video"
    channels, features = (16, 72) if clip else (8, 48)
    generator = torch.Generator().manual_seed(0)
    basis = Basis(
        0.1 * torch.randn(features, generator=generator), torch.randn(channels, features, generator=generator) / 8
    )
    vae = build_vae("clip" if clip else "picture")
    assert isinstance(vae, AutoencoderKLWan if clip else AutoencoderKL)
    (set_clip_encoder if clip else set_picture_encoder)(vae, basis)
    pixels = DRAW[name](6, 4).pixels
    with torch.inference_mode():
        got, wanted = vae.encode(pixels).latent_dist.mode(), basis.encode(pixels)
    assert got.shape == wanted.shape
    assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("name", [pytest.param(name, marks=trained(name)) for name in FOLDERS])
def test_folders_are_whole_small_and_say_where_they_come_from(name: str) -> None:
    folder = FOLDERS[name]
    check_folder(folder)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 15_000_000
    assert "Apache" in (folder / "NOTICE").read_text()
    captions = (folder / "captions.txt").read_text().splitlines()
    assert len(captions) == len(set(captions)) >= 160


@trained("video")
def test_the_video_in_the_box_follows_its_defaults() -> None:
    defaults = json.loads((ASSETS / "demo-video" / "generation_config.json").read_text())
    with Omni("demo-video") as omni:
        output = omni.generate("a red circle moving left", Params(num_inference_steps=4, seed=3), use_tqdm=False)[0]
    assert output.ok
    (clip,) = output.videos
    assert len(clip) == defaults["num_frames"] == 17
    assert clip[0].size == (defaults["width"], defaults["height"])
