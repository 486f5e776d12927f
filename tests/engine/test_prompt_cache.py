"""Embeddings of prompts that come again: the same to the bit, nobody else's, and within their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from http_server import video_folder
from picture_models import fill_folder, klein_folder
from PIL import Image
from pipelines import save_tiny_flux
from stepping import drain

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import normalise_prompt
from vllm_omni.inputs.prompt_cache import PromptCache


class Encodings:
    """Forwards of a pipeline's text encoders."""

    def __init__(self, omni: Omni) -> None:
        self.count = 0
        for name, part in omni.engine.worker.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, torch.nn.Module):
                part.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1

    def new(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def kept() -> Iterator[Omni]:
    with Omni("demo", dtype="float32") as omni:
        yield omni


def few(**more: Any) -> Params:
    return Params(num_inference_steps=2, seed=1, output_type="latent", **more)


def latents(omni: Omni, prompt: Any = "red apple", **more: Any) -> torch.Tensor:
    output = omni.generate(prompt, few(**more), use_tqdm=False)[0]
    assert output.ok, output.error
    return output.latents if output.latents is not None else torch.tensor(np.asarray(output.videos[0]))


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (level, level, level))


@pytest.mark.parametrize("model", ["flux", "wan", "fill", "klein"])
def test_a_prompt_that_comes_again_is_not_encoded_again(tmp_path: Path, model: str) -> None:
    build = {"flux": save_tiny_flux, "wan": video_folder, "fill": fill_folder, "klein": klein_folder}[model]
    folder = str(build(tmp_path))
    media: dict[str, Any] = {"image": gray(99)} if model in ("fill", "klein") else {}
    if model == "fill":
        media["mask_image"] = gray(255)
    sizes = {"height": 64, "width": 64, "max_sequence_length": 16} if model == "flux" else {}
    red, green = ({"prompt": f"{color} apple", "multi_modal_data": media} for color in ("red", "green"))
    with Omni(folder, prompt_cache_mb=0) as omni:
        wanted = latents(omni, red, **sizes)
    with Omni(folder) as omni:
        encodings = Encodings(omni)
        assert torch.equal(latents(omni, red, **sizes), wanted)
        assert (once := encodings.new()) > 0
        assert torch.equal(latents(omni, red, **sizes), wanted) and encodings.new() == 0
        assert not torch.equal(latents(omni, green, **sizes), wanted)
        assert 0 < encodings.new() <= once  # a negative prompt that is encoded by itself is there already
        latents(omni, red, **sizes | {"max_sequence_length": 8})
        assert encodings.new() == once


def test_each_asker_has_its_own(kept: Omni) -> None:
    encodings = Encodings(kept)
    for salt, computed in (("a", 2), ("b", 2), ("a", 0), ("b", 0), ("", 2)):
        request = OmniDiffusionRequest(f"r{salt}", "x", normalise_prompt("x"), few(), salt)
        kept.engine.add_request(request)
        drain(kept, {})
        assert encodings.new() == computed, salt


def test_embeddings_that_are_given_are_not_kept(kept: Omni) -> None:
    like = kept.engine.worker.pipeline.encode_prompt("x", None, max_sequence_length=16)
    given = {"prompt_embeds": torch.zeros_like(like[0]), "pooled_prompt_embeds": torch.zeros_like(like[1])}
    latents(kept, given)
    prompts = kept.engine.worker.runner.prompts
    assert (prompts.hits, prompts.misses, prompts.bytes) == (0, 0, 0)


def test_sleep_and_new_weights_forget_all(kept: Omni) -> None:
    encodings, prompts = Encodings(kept), kept.engine.worker.runner.prompts
    latents(kept)
    assert prompts.bytes > 0
    kept.sleep()
    assert prompts.bytes == 0
    kept.wake_up()
    assert encodings.new() == 2
    latents(kept)
    assert encodings.new() == 2


def test_a_pipeline_of_the_users_own_is_encoded_each_time() -> None:
    """Its owner may train an encoder in place."""
    with Omni("demo", dtype="float32") as omni, Omni.from_pipe(omni.engine.worker.pipeline) as own:
        encodings = Encodings(own)
        sizes = {"height": 64, "width": 64, "max_sequence_length": 16}
        assert torch.equal(latents(own, **sizes), latents(own, **sizes))
        assert encodings.new() == 4


# ------------------------------------------------------------------------------------------------------ the cache alone


def encode(*args: Any, **given: Any) -> Any:
    encode.count += 1  # type: ignore[attr-defined]
    return torch.full((1, 256), float(encode.count)), None  # type: ignore[attr-defined]


def computed(cache: PromptCache, *args: Any, owner: str = "", **given: Any) -> bool:
    before = getattr(encode, "count", 0)
    encode.count = before  # type: ignore[attr-defined]
    cache.encode(owner, encode, args, given)
    return encode.count > before  # type: ignore[attr-defined]


def test_it_keeps_within_its_bytes_and_the_least_recently_used_goes() -> None:
    cache = PromptCache(3 * 1024)
    assert all(computed(cache, text) for text in "abc") and cache.bytes == 3 * 1024
    assert not computed(cache, "a")
    assert computed(cache, "d") and cache.bytes == 3 * 1024
    assert not computed(cache, "a") and computed(cache, "b")
    small = PromptCache(1023)
    assert computed(small, "a") and computed(small, "a") and small.bytes == 0
    off = PromptCache(0)
    assert computed(off, "a") and computed(off, "a") and (off.hits, off.misses) == (0, 0)


def painted(shade: int, **info: int) -> Image.Image:
    """One index everywhere, of a palette in which it is `shade`."""
    image = Image.new("P", (4, 4), 0)
    image.putpalette([shade] * 3)
    image.info |= info
    return image


DIFFERENT: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("a",), {}), (("a", "b"), {}), (("ab",), {}), ((["a", "b"],), {}), ((["a"], "b"), {}), (("a", None), {}),
    ((), {"prompt": "a"}), ((), {"prompt": "a", "prompt_2": "b"}), ((), {"prompt": "a", "negative_prompt": "b"}),
    (("a", 1), {}), (("a", 1.0), {}), (("a", True), {}), (("a", "1"), {}), (("\ud800",), {}), (("\udc00",), {}),
    (("a", torch.zeros(2)), {}), (("a", torch.zeros(2, 1)), {}), (("a", torch.ones(2)), {}),
    (("a", torch.zeros(2, dtype=torch.bfloat16)), {}), (("a", np.zeros(2)), {}), (("a", torch.float32), {}),
    (("a", gray(1)), {}), (("a", gray(2)), {}), (("a", [gray(1), gray(2)]), {}), (("a", torch.device("cpu")), {}),
    (("a", painted(1)), {}), (("a", painted(2)), {}), (("a", painted(1, transparency=0)), {}),
]  # fmt: skip


def test_different_arguments_never_meet() -> None:
    cache = PromptCache(2**20)
    assert all(computed(cache, *args, **given) for args, given in DIFFERENT)
    assert not any(computed(cache, *args, **given) for args, given in DIFFERENT)
    assert all(computed(cache, *args, owner="b", **given) for args, given in DIFFERENT)


def test_what_cannot_be_compared_or_copied_is_not_kept() -> None:
    cache = PromptCache(2**20)
    assert computed(cache, "a", torch.Generator()) and computed(cache, "a", torch.Generator())
    assert cache.encode("", lambda text: object(), ("x",), {}) is not cache.encode(
        "", lambda text: object(), ("x",), {}
    )
    assert cache.bytes == 0


def test_what_a_caller_does_to_its_embeddings_is_its_own_affair() -> None:
    cache = PromptCache(2**20)
    first, _ = cache.encode("", lambda text: (torch.ones(4), None), ("x",), {})
    first.zero_()
    second, _ = cache.encode("", lambda text: (torch.zeros(4), None), ("x",), {})
    assert torch.equal(second, torch.ones(4))
    second.zero_()
    assert torch.equal(cache.encode("", lambda text: None, ("x",), {})[0], torch.ones(4))
