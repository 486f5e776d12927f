"""Models that nobody has described, each made by a function that a server can be given: `unknown_models:edits`."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers as d
import torch
from torch import nn
from zoo_images import nucleus
from zoo_parts import Processor, language_model, qwen_vae, stand_in, t5, words_tokenizer
from zoo_prompts import joy
from zoo_sound import stable_audio as sounds
from zoo_videos import skyreels

__all__ = ["edits", "experts", "ours", "sounds", "videos"]

edits = partial(joy, d.JoyImageEditPlusPipeline, d.JoyImageEditPlusTransformer3DModel)


def videos() -> Any:
    """SkyReels V2."""
    made = skyreels()
    stand_in(type(made).__module__, "ftfy", SimpleNamespace(fix_text=str))
    made.register_modules(text_encoder=t5(), tokenizer=words_tokenizer(512))
    return made


def experts() -> Any:
    """Nucleus-Image, a mixture of experts."""
    made = nucleus()
    made.register_modules(text_encoder=language_model(layers=8), processor=Processor(), vae=qwen_vae())
    return made


class Denoiser(nn.Module):
    """Twelve blocks between an embedding and a head, of no library."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.clock, self.head = nn.Linear(3, width), nn.Linear(1, width), nn.Linear(width, 3)
        self.text = nn.Embedding(256, width)
        self.trunk = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, width, 0, batch_first=True) for _ in range(12))

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(noisy) + self.clock(when[:, None, None]) + self.text(letters).mean(1, keepdim=True)
        for block in self.trunk:
            hidden = block(hidden)
        return self.head(hidden)


class OurPipeline(d.DiffusionPipeline):
    """Pictures of a model of one's own, whose latents are pixels."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 20,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        latents = torch.randn(1, height * width // 16, 3, generator=generator)
        letters = torch.tensor([list(prompt.encode())])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            velocity = self.transformer(latents, t.expand(1) / 1000, letters)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return {"images": latents}
        pixels = latents.reshape(1, height // 4, width // 4, 3).permute(0, 3, 1, 2)
        whole = nn.functional.interpolate(pixels.sigmoid() * 2 - 1, size=(height, width))
        return {"images": d.image_processor.VaeImageProcessor().postprocess(whole, output_type=output_type)}


def ours() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OurPipeline(Denoiser().eval(), d.FlowMatchEulerDiscreteScheduler())
