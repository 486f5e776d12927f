"""Plain settings that a pipeline changes on other parts than its denoiser: LTX's long videos tile their VAE."""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from pipelines import DEFAULTS, embeds, tiny_flux
from stepping import add, drain

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params


class Tiles(d.FluxPipeline):
    """Decodes in tiles if it is told to, and leaves it at that; the VAE also keeps a list that is its own affair."""

    def __call__(self, tiled: bool = False, early: bool = True, **kwargs: Any) -> Any:
        self.vae.kept = [None] * (3 if vars(self.vae).get("kept") is None else len(self.vae.kept) + 1)
        if tiled and early:
            self._tile()
        latents = super().__call__(**kwargs | {"output_type": "latent"}).images
        if tiled and not early:
            self._tile()
        latents = self._unpack_latents(latents, 32, 32, self.vae_scale_factor)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return d.pipelines.flux.FluxPipelineOutput(images=images.detach().float().numpy())

    def _tile(self) -> None:
        self.vae.enable_tiling()
        self.vae.tile_latent_min_size, self.vae.tile_sample_min_size, self.vae.tile_overlap_factor = 8, 16, 0.5


def tiling() -> Any:
    pipe = Tiles(**tiny_flux().components)
    pipe.vae.kept = None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(i: int, steps: int, **how: bool) -> np.ndarray:
    generator = torch.Generator().manual_seed(i)
    return np.asarray(tiling()(**embeds(i), **DEFAULTS, num_inference_steps=steps, generator=generator, **how).images)


CASES: list[dict[str, bool]] = [{}, {"tiled": True}, {"tiled": True, "early": False}, {}]


def test_tiling_is_for_the_request_that_asked_for_it() -> None:
    wanted = [plain(i, 3 + i % 2, **how) for i, how in enumerate(CASES)]
    assert np.abs(wanted[1] - plain(1, 4)).max() > 0.1
    pipe = tiling()
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        params = [Params(num_inference_steps=3 + i % 2, seed=i, extra_args=how) for i, how in enumerate(CASES)]
        outputs = omni.generate([embeds(i) for i in range(len(CASES))], params, use_tqdm=False)
        for output, images in zip(outputs, wanted, strict=True):
            assert output.ok, output.error
            assert np.abs(np.asarray(output.images[0]) - images[0]).max() < 1e-4
        assert not pipe.vae.use_tiling and "tile_overlap_factor" in vars(pipe.vae)
        assert isinstance(pipe.vae.kept, list)  # not a setting: left as the pipelines made it


@pytest.mark.parametrize("after", [1, 3])
def test_an_aborted_request_leaves_no_setting(after: int) -> None:
    pipe = tiling()
    before = {name: value for name, value in vars(pipe.vae).items() if isinstance(value, bool | int | float)}
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        add(omni, "tiled", embeds(0), Params(num_inference_steps=8, seed=0, extra_args={"tiled": True}))
        for _ in range(after):
            omni.engine.step()
        omni.engine.abort(["tiled"])
        assert drain(omni, {})["tiled"].error
        assert {name: vars(pipe.vae)[name] for name in before} == before
        output = omni.generate(embeds(1), Params(num_inference_steps=4, seed=1), use_tqdm=False)[0]
    assert np.abs(np.asarray(output.images[0]) - plain(1, 4)[0]).max() < 1e-4
