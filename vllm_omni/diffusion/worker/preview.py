"""What a running request would look like if it stopped now. Knows pipelines and coroutines, no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_omni.diffusion.worker.coroutine import DenoiserCall, Failed, Finished, PipelineTask
from vllm_omni.kernels.beside import Elsewhere
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


def can_preview(pipeline: Any) -> bool:
    """Flow matching only: there the clean latents are x - sigma v."""
    return type(pipeline.scheduler).__name__.startswith("FlowMatch")


def preview(
    pipeline: Any,
    arguments: dict[str, Any],
    latents: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float,
    elsewhere: Mapping[str, Elsewhere],
) -> list[Any] | None:
    """The images of the clean latents that a step points at, x0 = x - sigma v, decoded by the pipeline itself.

    A second run of the same pipeline begins with x0, takes one step, and is answered a velocity of zero: x0 stays as it
    is and goes on to whatever decoding the pipeline has. None, and a log line, where the pipeline will not have that.
    """
    clean = latents - sigma * velocity.to(latents.dtype)
    once = {name: value for name, value in arguments.items() if name not in ("sigmas", "timesteps")}
    once |= {"latents": clean, "num_inference_steps": 1, "generator": None}
    task = PipelineTask(pipeline, once, latents.device, components=False, elsewhere=elsewhere)
    event = task.resume()
    while isinstance(event, DenoiserCall):
        event = task.resume((torch.zeros_like(event.kwargs["hidden_states"]),))
    if isinstance(event, Failed):
        logger.warning("no preview: %s", event.error)
        return None
    assert isinstance(event, Finished)
    result = event.output[0] if isinstance(event.output, tuple) else next(iter(event.output.values()))
    return list(result)
