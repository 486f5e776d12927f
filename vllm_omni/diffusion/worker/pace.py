"""A budget in seconds as a number of full forwards, once the request's size and schedule are known."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

from vllm_omni.diffusion.cache.plan.schedule import Schedule, forced_steps
from vllm_omni.diffusion.cache.settings import AUTO, Budget, CacheSettings
from vllm_omni.diffusion.denoiser.rows import latents_of
from vllm_omni.diffusion.worker.arguments import arguments_of
from vllm_omni.diffusion.worker.request import Request
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.timing import Pace
from vllm_omni.learning import likeness


def settle(pace: Pace, settings: CacheSettings, size: Hashable, schedule: Schedule, own: bool = False) -> CacheSettings:
    """The settings with the most full forwards that a budget of seconds allows, `nfe`.

    Where nothing of this size has been measured, the engine's `own` budget waits for the first request that ran alone,
    under "auto", and a request's is an InvalidValueError; so is one that even the fewest forwards exceed.
    """
    budget = settings.plan
    if not isinstance(budget, Budget) or budget.seconds is None:
        return settings
    if (known := pace.known(size)) is None:
        if own:
            return settings._replace(plan=AUTO)
        raise InvalidValueError(
            "seconds", budget.seconds, "needs a request of this size that ran alone with a cache before it"
        )
    left = budget.seconds - known.coding.seconds - schedule.steps * known.skipped.seconds
    each = max(known.computed.seconds - known.skipped.seconds, 1e-9)
    least = len(forced_steps(schedule.steps, settings.config.compute_last_step, schedule.switches))
    if (nfe := min(int(left / each), schedule.steps)) < least:
        nearest = budget.seconds - left + least * each
        steps = f"{schedule.steps} steps of this size"
        fix = f"is out of reach for {steps} (nearest: {nearest:.3g}, {least} full forwards)"
        raise InvalidValueError("seconds", budget.seconds, fix)
    return settings._replace(plan=Budget(nfe=nfe, seconds=budget.seconds))


def usual(request: Request) -> dict[str, Any] | None:
    """What a request was like that a profile may be learnt of; None: it may not.

    It may if it has the model as it is, on the whole schedule that the scheduler has made.
    """
    asked, timesteps = request.task.arguments, request.task.pipeline.scheduler.timesteps
    own = asked.get("sigmas") is not None or asked.get("timesteps") is not None or request.own_boundary
    whole = request.schedule is not None and request.schedule.steps == len(timesteps)
    return likeness(asked) if whole and not (own or request.adapters or request.changes) else None


def size_of(denoiser: str, arguments: Mapping[str, Any], asked: Mapping[str, Any], pipeline: Any) -> Hashable:
    """What makes two requests take equally long per step: the denoiser, its latents' shape, and guided or not.

    A guidance scale that is not `asked` for is the pipeline's own.
    """
    hidden = latents_of(arguments)
    shapes = tuple(tuple(latents.shape) for latents in (hidden if isinstance(hidden, list) else [hidden]))
    usual = _defaults(pipeline.__class__)
    guided = [float(asked.get(name, usual.get(name)) or 1) > 1 for name in ("guidance_scale", "true_cfg_scale")]
    return denoiser, shapes, *guided, "negative_prompt" in likeness(asked)


@lru_cache(maxsize=16)
def _defaults(pipeline: type) -> dict[str, Any]:
    """Default values of a pipeline's call."""
    taken = arguments_of(pipeline).values()
    return {one.name: one.default for one in taken if isinstance(one.default, int | float)}
