"""Servers of models that nobody has described, given as functions, and the official client."""

from __future__ import annotations

import base64
import io
import os
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import imageio.v3 as imageio
import numpy as np
import pytest
import unknown_models
from http_server import AUTH, KEY, Running, serve
from lanes import full_set
from openai import OpenAI
from paths import ROOT
from PIL import Image

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params

MASK = [1, 1, 0, 1, 0, 1]  # of the six steps that every request here has
SIZE = {"size": "32x32", "num_inference_steps": 6}


@contextmanager
def serving(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, OpenAI]]:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(folder))
    engine = {"model": f"unknown_models:{name}", "cache_backend": "magcache", "cache_config": {"steps_mask": MASK}}
    with serve(engine | {"max_num_seqs": 4}) as running, OpenAI(base_url=f"{running.url}/v1", api_key=KEY) as client:
        yield running, client


def all_at_once(ask: Any) -> list[Any]:
    """What four clients get, of seeds 0 to 3."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(4)))


def picture(entry: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry.b64_json))), dtype=int)


def was_cached(running: Running) -> dict[str, Any]:
    """What the server says of the denoiser, after four requests of six steps, two of which were left out."""
    told = httpx.get(f"{running.url}/v1/omni/cache", headers=AUTH).json()["denoisers"]["transformer"]
    assert (told["known"], told["cached"], told["batched"], told["reasons"]) == ("found", True, True, [])
    stats = running.idle()
    assert stats.steps_skipped == 8 and stats.cache_bytes == 0 and stats.requests["finished"] == 4
    return told


def alone(name: str, seed: int, prompt: Any, **more: Any) -> Any:
    """What `Omni` makes of it."""
    with Omni.from_pipe(
        vars(unknown_models)[name](), cache_backend="magcache", cache_config={"steps_mask": MASK}
    ) as omni:
        params = Params(num_inference_steps=6, seed=seed, height=32, width=32, **more)
        (output,) = omni.generate([prompt], params, use_tqdm=False)
        assert output.error is None
        return output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", pytest.param("experts", marks=full_set)])
def test_pictures_of_a_model_of_ones_own_and_of_a_mixture_of_experts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(name, tmp_path, monkeypatch) as (running, client):
        made = all_at_once(lambda i: client.images.generate(prompt="red dog", extra_body=SIZE | {"seed": i}))
        assert was_cached(running)["class"] in ("Denoiser", "NucleusMoEImageTransformer2DModel")
    pictures = [picture(one.data[0]) for one in made]
    assert not np.array_equal(pictures[0], pictures[1])
    for seed in (0, 3):
        assert np.abs(np.asarray(alone(name, seed, "red dog").images[0], dtype=int) - pictures[seed]).max() <= 1


@pytest.mark.slow
def test_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    photo.save(file, "PNG")
    with serving("edits", tmp_path, monkeypatch) as (running, client):
        made = all_at_once(
            lambda i: client.images.edit(
                image=("photo.png", file.getvalue()), prompt="dark dog", extra_body=SIZE | {"seed": i}
            )
        )
        was_cached(running)
    prompt = {"prompt": "dark dog", "multi_modal_data": {"images": [photo]}}
    assert np.abs(np.asarray(alone("edits", 2, prompt).images[0], dtype=int) - picture(made[2].data[0])).max() <= 1


@pytest.mark.slow
def test_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def film(client: OpenAI, seed: int) -> bytes:
        job = client.videos.create(
            prompt="fast dog", size="32x32", extra_body={"num_inference_steps": 6, "num_frames": 5, "seed": seed}
        )
        until = time.monotonic() + 60
        while job.status in ("queued", "in_progress") and time.monotonic() < until:
            time.sleep(0.1)
            job = client.videos.retrieve(job.id)
        assert job.status == "completed", job
        return client.videos.download_content(job.id).content

    with serving("videos", tmp_path, monkeypatch) as (running, client):
        clips = all_at_once(lambda i: film(client, i))
        was_cached(running)
    frames = [imageio.imread(clip, plugin="FFMPEG", extension=".mp4") for clip in clips]
    assert frames[0].shape == (5, 32, 32, 3) and not np.array_equal(frames[0], frames[1])


@pytest.mark.slow
def test_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "slow piano", "num_inference_steps": 6, "seconds": 0.016}
    with serving("sounds", tmp_path, monkeypatch) as (running, client):
        made = all_at_once(
            lambda i: client.post("/audio/generate", body=body | {"seed": i}, cast_to=httpx.Response).content
        )
        was_cached(running)
    with wave.open(io.BytesIO(made[0])) as first:
        assert first.getnframes() > 0
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("unknown_models:nothing", "the module has no 'nothing'"),
        ("unknown_models:Any", "could not be loaded"),
        ("unknown_models:Denoiser", "returned a Denoiser, and not a DiffusionPipeline"),
    ],
)
def test_a_function_that_makes_no_pipeline_is_refused_with_the_reason(model: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Omni(model)
