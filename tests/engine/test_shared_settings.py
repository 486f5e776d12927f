"""What a pipeline changes for the time of its call besides processors and the denoiser's own settings: those of other
parts (LTX's long videos tile their VAE), hooks and blocks (guiders), torch's autocast; and a lock that it holds.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from closeness import assert_close
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from pipelines import DEFAULTS, embeds, run_latents, tiny_flux
from stepping import add, drain
from zoo_images import IMAGES
from zoo_videos import VIDEOS

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


@pytest.mark.parametrize("where", [{}, {"vae_device": "cpu"}], ids=["in line", "elsewhere"])
def test_tiling_is_for_the_request_that_asked_for_it(where: dict[str, str]) -> None:
    wanted = [plain(i, 3 + i % 2, **how) for i, how in enumerate(CASES)]
    assert np.abs(wanted[1] - plain(1, 4)).max() > 0.1
    pipe = tiling()
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **where) as omni:
        params = [Params(num_inference_steps=3 + i % 2, seed=i, extra_args=how) for i, how in enumerate(CASES)]
        outputs = omni.generate([embeds(i) for i in range(len(CASES))], params, use_tqdm=False)
        for output, images in zip(outputs, wanted, strict=True):
            assert output.ok, output.error
            assert_close(np.asarray(output.images[0]), images[0])
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
    assert_close(np.asarray(output.images[0]), plain(1, 4)[0])


# ------------------------------------------------------------------------------- hooks, blocks, autocast, a lock

MARK = 7.0  # the guidance scale of those that change something


class Marked(d.FluxPipeline):
    def __call__(self, guidance_scale: float = 3.5, **kwargs: Any) -> Any:
        if guidance_scale != MARK:
            return super().__call__(guidance_scale=guidance_scale, **kwargs)
        return self.changed(lambda: super(Marked, self).__call__(guidance_scale=guidance_scale, **kwargs))

    def changed(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError


class Hooked(Marked):
    def changed(self, call: Callable[[], Any]) -> Any:
        block = self.transformer.transformer_blocks[0]
        handle = block.register_forward_hook(lambda module, given, out: tuple(value * 0.5 for value in out))
        try:
            return call()
        finally:
            handle.remove()


class OtherForward(Marked):
    def changed(self, call: Callable[[], Any]) -> Any:
        block = self.transformer.single_transformer_blocks[1]
        own = block.forward
        block.forward = lambda *args, **kwargs: tuple(value * 0.5 for value in own(*args, **kwargs))
        try:
            return call()
        finally:
            del block.forward


class FewerBlocks(Marked):
    def changed(self, call: Callable[[], Any]) -> Any:
        own = self.transformer.single_transformer_blocks
        self.transformer.single_transformer_blocks = torch.nn.ModuleList(list(own)[:2])
        try:
            return call()
        finally:
            self.transformer.single_transformer_blocks = own


class Autocast(Marked):
    def changed(self, call: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call()


class Locked(d.FluxPipeline):
    """One call at a time: each request runs in a copy of the pipeline, and none may wait for another that is parked."""

    def __call__(self, **kwargs: Any) -> Any:
        with self.lock:
            return super().__call__(**kwargs)


@pytest.mark.parametrize("cache", [{}, {"cache_backend": "magcache", "cache_config": {"mag_ratios": [1.0] * 8}}])
@pytest.mark.parametrize("kind", [Hooked, OtherForward, FewerBlocks, Autocast, Locked])
def test_what_a_call_changes_is_for_itself_alone(kind: type, cache: dict[str, Any]) -> None:
    def make() -> Any:
        pipe = tiny_flux()
        pipe.__class__, pipe.lock = kind, threading.Lock()
        return pipe

    cases = [(MARK, 8), (3.5, 11), (3.5, 9), (MARK, 10)]
    wanted = [
        run_latents(make(), i=i, seed=i, num_inference_steps=n, guidance_scale=scale)
        for i, (scale, n) in enumerate(cases)
    ]
    pipe = make()
    params = [
        Params(num_inference_steps=n, seed=i, output_type="latent", guidance_scale=scale)
        for i, (scale, n) in enumerate(cases)
    ]
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **cache) as omni:
        outputs = omni.generate([embeds(i) for i in range(len(cases))], params, use_tqdm=False)
        add(omni, "left", embeds(0), params[0])
        for _ in range(3):
            omni.engine.step()
        omni.engine.abort(["left"])
        drain(omni, {})
    for output, latents in zip(outputs, wanted, strict=True):
        assert output.ok, output.error
        distance = float((output.latents - latents).norm() / latents.norm())
        assert distance < (0.1 if cache else 1e-5) and bool(output.skipped_steps) == bool(cache)
    assert not torch.is_autocast_enabled("cpu")
    again = run_latents(pipe, i=1, seed=1, num_inference_steps=11, guidance_scale=3.5)
    assert torch.equal(again, wanted[1])


SKIPPED = LayerSkipConfig(indices=[1], fqn="transformer_blocks")
GUIDERS: dict[str, Callable[[], Any]] = {
    "skipped layers": lambda: guiders.SkipLayerGuidance(
        guidance_scale=3.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5, skip_layer_config=SKIPPED
    ),
    "auto": lambda: guiders.AutoGuidance(guidance_scale=3.0, auto_guidance_config=SKIPPED),
}
FAMILY = {family.name: family for family in [*IMAGES, *VIDEOS] if family.name in ("HunyuanImage 2.1", "Motif-Video")}


@pytest.mark.parametrize("warm", [False, True], ids=["", "after a plain run"])
@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("name", FAMILY)
def test_a_guiders_hooks_are_its_own_requests(name: str, guider: str, warm: bool) -> None:
    """They come and go with each call of the denoiser, whatever neighbours do, and an aborted request leaves none."""
    family, counts = FAMILY[name], (4, 7, 5)

    def make() -> Any:
        pipe = family.build()
        pipe.guider = GUIDERS[guider]()
        return pipe

    def plain(pipe: Any, i: int) -> torch.Tensor:
        call = {"num_inference_steps": counts[i], "output_type": "latent", **family.settings}
        return next(iter(pipe(**family.prompt(i), **call, generator=torch.Generator().manual_seed(i)).values()))

    sizes = {name: value for name, value in family.settings.items() if name in ("height", "width", "num_frames")}
    extra = {name: value for name, value in family.settings.items() if name not in sizes}
    params = [
        Params(num_inference_steps=n, seed=i, output_type="latent", extra_args=extra, **sizes)
        for i, n in enumerate(counts)
    ]
    wanted, pipe = [plain(make(), i) for i in range(3)], make()
    if warm:
        plain(pipe, 0)
    with Omni.from_pipe(pipe) as omni:
        add(omni, "left", family.prompt(0), params[0])
        for _ in range(4):
            omni.engine.step()
        omni.engine.abort(["left"])
        drain(omni, {})
        outputs = omni.generate([family.prompt(i) for i in range(3)], params, use_tqdm=False)
    for output, latents in zip(outputs, wanted, strict=True):
        assert output.ok, output.error
        assert_close(output.latents, latents)


def test_a_second_guider_is_each_requests_own() -> None:
    """HunyuanImage has one for prompts with quoted text, which notes its step and keeps a momentum."""
    family, counts = FAMILY["HunyuanImage 2.1"], (4, 7, 5)

    def make() -> Any:
        pipe = family.build()
        pipe.ocr_guider = guiders.AdaptiveProjectedMixGuidance(guidance_scale=4.0)
        return pipe

    pipe, wanted = make(), []
    for i, steps in enumerate(counts):
        call = {"num_inference_steps": steps, "output_type": "latent", **family.settings}
        wanted.append(make()(**family.prompt(i), **call, generator=torch.Generator().manual_seed(i)).images)
    with Omni.from_pipe(pipe) as omni:
        params = [
            Params(num_inference_steps=n, seed=i, output_type="latent", **family.settings) for i, n in enumerate(counts)
        ]
        outputs = omni.generate([family.prompt(i) for i in range(3)], params, use_tqdm=False)
    for output, latents in zip(outputs, wanted, strict=True):
        assert_close(output.latents, latents)


class Upcasts(d.FluxPipeline):
    """Decodes in float32, as AuraFlow's pipeline does, and does not go back; with three steps it fails instead."""

    def __call__(self, num_inference_steps: int = 4, **kwargs: Any) -> Any:
        if num_inference_steps == 5:  # changed from the beginning: it waits in between for its denoiser
            self.vae.to(dtype=torch.float32)
        kwargs["output_type"] = "latent"
        latents = super().__call__(num_inference_steps=num_inference_steps, **kwargs).images
        if num_inference_steps < 5:
            self.vae.to(dtype=torch.float32)
        if num_inference_steps == 3:
            raise RuntimeError("no room")
        latents = self._unpack_latents(latents, 32, 32, self.vae_scale_factor)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return d.pipelines.flux.FluxPipelineOutput(images=images.detach().float().numpy())


@pytest.mark.parametrize("where", [{}, {"vae_device": "cpu"}], ids=["in line", "elsewhere"])
def test_a_vae_that_was_cast_is_as_before_for_everybody_else(where: dict[str, str]) -> None:
    pipe = tiny_flux()
    pipe.__class__ = Upcasts
    pipe.vae.to(torch.bfloat16)
    pipe.vae.register_buffer("shift", torch.ones(3, dtype=torch.float64))
    before = {name: tensor.dtype for name, tensor in pipe.vae.state_dict().items()}

    def plain(i: int, steps: int) -> torch.Tensor:
        own = copy.deepcopy(pipe)
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(i)
        images = own(**embeds(i), **DEFAULTS, num_inference_steps=steps, generator=generator).images
        return torch.as_tensor(images)

    counts = [4, 6, 5, 3, 8]
    wanted = {i: plain(i, steps) for i, steps in enumerate(counts) if steps != 3}
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **where) as omni:
        for i, steps in enumerate(counts):
            add(omni, str(i), embeds(i), Params(num_inference_steps=steps, seed=i))
        outputs: dict[str, Any] = {}
        while omni.engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in omni.engine.step()}
            assert {name: tensor.dtype for name, tensor in pipe.vae.state_dict().items()} == before
    for i, image in wanted.items():
        assert outputs[str(i)].ok, outputs[str(i)].error
        away = torch.as_tensor(outputs[str(i)].images[0]) - image[0]
        assert away.norm() < 1e-5 * image[0].norm()
    assert "no room" in str(outputs["3"].error)
