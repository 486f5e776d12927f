"""What a running request would look like if it stopped now. Knows pipelines and coroutines, no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.rows import latents_of
from vllm_omni.diffusion.worker.batching import CallBinder
from vllm_omni.diffusion.worker.coroutine import DenoiserCall, Failed, Finished, PipelineTask
from vllm_omni.diffusion.worker.request import Request
from vllm_omni.kernels.beside import Elsewhere
from vllm_omni.kernels.device import tried
from vllm_omni.logger import init_logger
from vllm_omni.nested import mapped

logger = init_logger(__name__)


def can_preview(pipeline: Any) -> bool:
    """Flow matching only: there the clean latents are x - sigma v."""
    return type(pipeline.scheduler).__name__.startswith("FlowMatch")


def draw(
    request: Request, pipeline: Any, binders: Mapping[str, CallBinder], elsewhere: Mapping[str, Elsewhere]
) -> None:
    """Draw the preview that is due, unless the picture itself comes. What goes wrong is told, and costs the preview."""
    due, request.previews.due = request.previews.due, None
    if due is None or request.schedule is None or request.parked is None or not isinstance(request.call, DenoiserCall):
        return
    step, velocity, latents = due
    clean = latents - request.schedule.sigmas[step] * velocity.to(latents.dtype)
    asked = request.task.arguments
    images, error = tried(lambda: _pictures(pipeline, asked, clean, binders, elsewhere))
    if error is not None:
        logger.warning("no preview: %s", error)
    request.previews.images = images or None


def _pictures(
    pipeline: Any,
    arguments: dict[str, Any],
    clean: torch.Tensor,
    binders: Mapping[str, CallBinder],
    elsewhere: Mapping[str, Elsewhere],
) -> list[Any]:
    """The images of the clean latents that a step points at, x0 = x - sigma v, decoded by the pipeline itself.

    A second run of the same pipeline begins with x0, takes one step, and is answered a velocity of zero: x0 stays as it
    is and goes on to whatever decoding the pipeline has. Raises what the pipeline raises where it will not have that.
    """
    once = {name: value for name, value in arguments.items() if name not in ("sigmas", "timesteps")}
    once |= {"latents": clean, "num_inference_steps": 1, "generator": None}
    task = PipelineTask(pipeline, once, clean.device, components=False, elsewhere=elsewhere)
    event = task.resume()
    while isinstance(event, DenoiserCall):
        latents = latents_of(binders[event.denoiser].bind(event.args, event.kwargs))
        event = task.resume((mapped(latents, torch.zeros_like),))
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Finished)
    result = event.output[0] if isinstance(event.output, tuple) else next(iter(event.output.values()))
    return list(result)
