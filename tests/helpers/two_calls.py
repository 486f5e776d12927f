"""A pipeline of two denoiser calls per step that does something with the first result, or with its buffers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from pipelines import tiny_flux

SIDE = 4  # tokens


class Louder:
    """An attention processor whose result is another one's, and more of it."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * stream for stream in self.own(*args, **kwargs))


class TwoCalls(FluxPipeline):
    """Guidance written down plainly; `way` says what happens between the calls of a step."""

    def __call__(
        self,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 8,
        generator: Any = None,
        output_type: str = "latent",
        way: str = "plain",
    ) -> Any:
        latents = torch.randn(1, SIDE * SIDE, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps, mu=0.5)
        ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(SIDE)), torch.arange(float(SIDE)))
        buffer = torch.empty_like(prompt_embeds)

        def noise(text: torch.Tensor, pooled: torch.Tensor, x: torch.Tensor) -> Any:
            if way in ("one buffer", "late, one buffer"):
                text = buffer.copy_(text)
            return self.transformer(
                hidden_states=x,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=torch.full((1,), float(t) / 1000),
                guidance=torch.ones(1),
                img_ids=ids,
                txt_ids=torch.zeros(text.shape[1], 3),
                return_dict=way == "dict",
            )[0]

        for i, t in enumerate(self.scheduler.timesteps):
            with_text = noise(prompt_embeds, pooled_prompt_embeds, latents)
            seen: Any = latents
            if way == "views":
                with_text = with_text[:, :, :8].unsqueeze(0).permute(0, 1, 3, 2).reshape(1, 8, -1).transpose(1, 2)
                with_text = torch.cat([with_text.chunk(2, dim=2)[0], with_text[..., 4:]], 2) if i < 0 else with_text
            elif way == "reads" and float(with_text.abs().max()) > 1e6:
                raise AssertionError
            elif way == "picks":  # by a mask: a copy
                assert len(with_text[torch.ones(1, SIDE * SIDE, dtype=torch.bool)])
            elif way == "passes on":
                seen = with_text
            if (way == "stops" and i >= num_inference_steps // 2) or (way == "late, one buffer" and i < 2):
                velocity = with_text
            else:
                attention = self.transformer.transformer_blocks[0].attn
                own = attention.processor
                if way == "changes between" and i >= 3:
                    attention.processor = Louder(own)
                without = noise(negative_prompt_embeds, negative_pooled_prompt_embeds, seen)
                attention.processor = own
                without = without[:, :, :8] if way == "views" else without
                velocity = without + 3.0 * (with_text - without)
            if way == "views":
                velocity = torch.cat([velocity, velocity], dim=2)
            latents = self.scheduler.step(velocity, t, latents)[0]
        if way == "raises":
            raise ValueError("at the end")
        return FluxPipelineOutput(images=latents)


def two_calls() -> TwoCalls:
    parts = tiny_flux()
    made = TwoCalls(**{name: parts.components[name] for name in (
        "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"
    )})  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made
