"""Learns what requests alone do not teach, in the time that nobody needs the engine.

That is curve and matrix of schedules that requests have and a published curve serves, and what finishes a profile.

Trials are requests of its own, one at a time: they step only while nothing else is there, count nowhere, and wait in
the middle while others run. Their prompts are the ones below; nobody's own is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request import PlanOf
from vllm_omni.engine.interface import ModelInfo
from vllm_omni.errors import OmniError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.kernels.device import refuse_lost
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.trials import Away, Measurement, Trial, choices, figures, gains

logger = init_logger(__name__)

MOST_REPEATS = 20  # of trials that had no room
IDLE_S = 1.0  # without a request, before a trial begins
GAIN_PROMPTS, CHOSEN_ON, JUDGED_ON = 2, 2, 8
FIRST_SEED = 31_000
PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman, overcast light",
    "a bowl of lemons on a wooden table",
    "mountain lake at sunrise, mist over the water",
    "a crowded night market, neon signs, rain",
    "a fox running through snow",
    "an astronaut in a greenhouse, watercolour",
    "isometric drawing of a small workshop",
    "macro photograph of a dragonfly",
    "a lighthouse in a storm, oil painting",
    "two children flying a kite on a beach",
    "an empty train station in morning light",
)


def sample_prompt(
    info: ModelInfo, text: str, asked: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt, parameters) of a request at the model's own size or the one `asked`, with a gray picture if needed."""
    size: dict[str, Any] = {name: info.defaults[name] for name in ("height", "width") if name in info.defaults}
    size |= asked or {}
    prompt: dict[str, Any] = {"prompt": text}
    if (needed := [name for name, picture in info.pictures.items() if picture.needed]) and size:
        from PIL import Image

        gray = Image.new("RGB", (size["width"], size["height"]), "gray")
        prompt["multi_modal_data"] = {name: gray.convert("L") if "mask" in name else gray for name in needed}
    return prompt, size


class IdleLearning:
    """Begins trials on an engine, and takes what they give into the profile that they are for."""

    def __init__(self, engine: DiffusionEngine, info: ModelInfo) -> None:
        self._engine, self._info = engine, info
        self._numbers = count()
        self._profile: CacheProfile | None = None
        self._measurement: Measurement[CacheProfile] | None = None
        self._results: list[Away] = []
        self._exact: dict[bool, tuple[int, torch.Tensor]] = {}  # of the last prompt: latents, and what is decoded
        self._trial: tuple[str, Trial | None] | None = None  # under way; None: a run that is measured itself
        self._repeats = 0

    @property
    def wanted(self) -> bool:
        """Whether there is something to try."""
        learner = self._engine.worker.learner
        if self._trial is not None or learner is None or learner.learning is None or learner.learning.over:
            return False
        return learner.learn() is not None or learner.learning.to_run() is not None

    @property
    def progress(self) -> str:
        """What is being learnt, in words; "" if nothing is."""
        learner = self._engine.worker.learner
        if learner is None or learner.learning is None:
            return ""
        parts = [learner.learning.progress]
        if self._measurement is not None:
            parts.append(f"{self._measurement.name}: {len(self._results)} of {len(self._measurement.trials)} runs")
        return "; ".join(part for part in parts if part)

    def begin(self) -> None:
        """Begin the next trial."""
        self._guarded(self._begin)

    def _begin(self) -> None:
        learner = self._engine.worker.learner
        assert learner is not None and learner.learning is not None
        profile, to_run = learner.learn(), learner.learning.to_run()
        if to_run is not None:
            schedule, course = to_run
            if not course.runs:
                logger.info("magcache: %d steps, cached by a curve so far, are measured now", schedule.steps)
            course.runs += 1
            number = len(PROMPTS) + course.runs  # with seeds of their own
            state_of = partial(learner.learning.state_of_run, schedule)
            self._run(None, number, schedule.steps, course.size, state_of)
            return
        if profile is None:
            return
        if self._profile is None or profile.name != self._profile.name:
            self._profile, self._measurement = profile, None
        if self._measurement is None:
            switches = tuple(profile.provenance.get("switches", ()))
            self._measurement, self._results, self._exact = _next(profile, switches), [], {}
            logger.info("magcache: %s of %s, when nobody waits", self._measurement.name, profile.name)
        if not self._measurement.trials:
            read = self._measurement.read([])
            learner.learning.over = read == profile  # nothing more can be found by trying
            self._finish(read)
            return
        trial = self._measurement.trials[len(self._results)]
        if self._exact.get(trial.picture, (None,))[0] != trial.prompt:
            trial = Trial(trial.prompt, picture=trial.picture)
        steps, size = trial.steps or len(profile.ratios), profile.provenance.get("size", {})
        self._run(trial, trial.prompt, steps, size, trial.plan or _uncached)

    def _run(self, trial: Trial | None, number: int, steps: int, asked: Mapping[str, int], plan_of: PlanOf) -> None:
        prompt, size = sample_prompt(self._info, PROMPTS[number % len(PROMPTS)], asked)
        params = OmniDiffusionSamplingParams(
            num_inference_steps=steps,
            seed=FIRST_SEED + number,
            output_type="np" if trial is not None and trial.picture else "latent",
            cache="off",  # it has a plan of its own: what the engine's settings would refuse is nothing to it
            **size,
        )
        request = OmniDiffusionRequest(f"trial-{next(self._numbers)}\0", prompt, normalise_prompt(prompt), params)
        self._trial = request.request_id, trial
        self._engine.try_out(request, plan_of)

    def takes(self, output: OmniRequestOutput) -> bool:
        """Take in a trial's end; False if the output is somebody's."""
        if self._trial is None or output.request_id != self._trial[0]:
            return False
        (_, trial), self._trial = self._trial, None
        if isinstance(output.error, RequestAbortedError):  # begun again when there is time
            return True
        if output.error is not None:
            self._give_up(output.error)
            return True
        if trial is not None:
            self._guarded(partial(self._take, trial, output))
        return True

    def _guarded(self, act: Callable[[], None]) -> None:
        """What goes wrong in a trial ends them, and nothing else."""
        try:
            act()
        except Exception as error:
            refuse_lost(error)
            self._give_up(error)

    def _take(self, trial: Trial, output: OmniRequestOutput) -> None:
        found = _values(output)
        held = self._exact.get(trial.picture)
        if held is None or held[0] != trial.prompt:
            self._exact[trial.picture] = trial.prompt, found
            return
        if output.plan is not None and output.skipped_steps != output.plan.count(False):
            self._repeats += 1  # its residuals had no room: again, later
            if self._repeats > MOST_REPEATS:
                raise OmniError("trials find no room for their residuals")
            return
        self._results.append(Away((found - held[1]).pow(2).mean().item(), held[1].pow(2).mean().item()))
        assert self._measurement is not None
        if len(self._results) == len(self._measurement.trials):
            self._finish(self._measurement.read(self._results))

    def _finish(self, profile: CacheProfile) -> None:
        learner = self._engine.worker.learner
        self._measurement, self._results, self._exact, self._profile = None, [], {}, None
        if learner is not None:
            learner.learnt(profile)
            if not profile.lacks:
                logger.info("magcache: %s is complete: its budgets have decibels", profile.name)

    def stop(self) -> None:
        """End the trial under way: something is to be done to the engine. It is run again later."""
        if self._trial is not None:
            self._engine.abort([self._trial[0]])

    def forget(self) -> None:
        """Drop what was measured: the model has other weights now."""
        self._measurement, self._results, self._exact, self._profile = None, [], {}, None
        self._repeats = 0
        self._tell(over=False)

    def _give_up(self, error: Exception) -> None:
        self._trial = None
        self._tell(over=True)
        logger.warning("magcache: no more trials, one failed: %s; the profile stays as it is", error)

    def _tell(self, over: bool) -> None:
        """Let requests know whether what needs runs is going to come."""
        learner = self._engine.worker.learner
        if learner is not None and learner.learning is not None:
            learner.learning.over = over


def _uncached(schedule: Schedule) -> None:
    """No plan: every step computes."""


def _next(profile: CacheProfile, switches: tuple[int, ...]) -> Measurement[CacheProfile]:
    """What a learnt profile lacks first."""
    if profile.gains is None:
        return gains(profile, GAIN_PROMPTS, switches)
    if not profile.budgets:
        return choices(profile, CHOSEN_ON, GAIN_PROMPTS, switches)
    return figures(profile, JUDGED_ON, GAIN_PROMPTS + CHOSEN_ON)


def _values(output: OmniRequestOutput) -> torch.Tensor:
    """The final latents, or the decoded picture, clip or sound from 0 to 1."""
    if output.latents is not None:
        return output.latents.float().cpu()
    values: Sequence[Any] = output.images or output.videos or output.audio
    return torch.as_tensor(np.asarray(values[0], dtype=np.float32))
