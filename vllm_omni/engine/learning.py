"""Learns what requests alone do not teach, in the time that nobody needs the engine.

That is curve and matrix of schedules that requests have and a published curve serves, and what finishes a profile.

Trials are requests of its own, one at a time: they step only while nothing else is there, count nowhere, and wait in
the middle while others run. Their prompts are captions that come with the model, or the ones below; nobody's own is
ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch

from vllm_omni.diffusion.cache.plan.compose import CachePlan
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.profile import CacheProfile
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request import PlanOf
from vllm_omni.engine.interface import ModelInfo
from vllm_omni.errors import DeviceMemoryError, InvalidValueError, NumericalError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.kernels.device import refuse_lost
from vllm_omni.learning import MOST_RUNS, Course
from vllm_omni.logger import init_logger
from vllm_omni.model_folder import captions
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.outputs.made import values
from vllm_omni.trials import GAIN_PROMPTS, Away, Measurement, Trial, asked_steps, figures, gains, plans, refuse_noise
from vllm_omni.tuning import MOST_PROMPTS, tuned_weights

logger = init_logger(__name__)

MOST_REPEATS = 3  # of a trial that had no room
IDLE_S = 1.0  # without a request, before trials begin
TUNED_ON, JUDGED_ON = MOST_PROMPTS, 8  # prompts, after those for gains
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
    "a glass chess set, studio light",
    "terraced rice fields from above",
    "a violin on a velvet chair",
    "a comic panel of a cat that reads a newspaper",
    "a steam locomotive crossing a stone viaduct",
    "close-up of a blue butterfly on a thistle",
    "a knight in armour on a misty field",
    "a slice of cherry pie beside a cup of coffee",
)


def sample_prompt(
    info: ModelInfo, text: str, asked: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prompt, parameters) of a request at the model's own size, or as `asked` (see `likeness`); its pictures are gray.

    If none are asked for, they are those that the model needs.
    """
    size: dict[str, Any] = {name: info.defaults[name] for name in ("height", "width") if name in info.defaults}
    size |= asked or {}
    pictures = size.pop("pictures", None)
    if pictures is None and {"width", "height"} <= size.keys():
        needed = (name for name, picture in info.pictures.items() if picture.needed)
        pictures = {name: [size["width"], size["height"]] for name in needed}
    prompt: dict[str, Any] = {"prompt": text}
    if pictures:
        prompt["multi_modal_data"] = {name: _gray(name, asked_for) for name, asked_for in pictures.items()}
    return prompt, size


def _gray(name: str, size: Sequence[Any]) -> Any:
    """A picture, or several if there are several sizes."""
    from PIL import Image

    if not isinstance(size[0], int):
        return [_gray(name, one) for one in size]
    return Image.new("L" if "mask" in name else "RGB", (size[0], size[1]), "gray")


class _UnderWay(NamedTuple):
    """A run that is being made: a trial of the profile at hand, or one that is measured itself, for a course."""

    request_id: str
    trial: Trial | None
    course: Course | None


class IdleLearning:
    """Begins trials on an engine, and takes what they give into the profile that they are for."""

    def __init__(self, engine: DiffusionEngine, info: ModelInfo) -> None:
        self._engine, self._info = engine, info
        own = captions(engine.config.model)[::2]  # the others are for reports (quality/pairs.py)
        self._prompts = [own[i * len(own) // len(PROMPTS)] for i in range(len(PROMPTS))] if own else PROMPTS
        self._numbers = count()
        self._profile: CacheProfile | None = None
        self._measurement: Measurement[CacheProfile] | None = None
        self._plans: Iterator[list[CachePlan]] = iter(())
        self._results: list[Away] = []
        self._exact: dict[bool, tuple[int, torch.Tensor]] = {}  # of the last prompt: latents, and what is decoded
        self._run: _UnderWay | None = None
        self._course: Course | None = None  # that the last run was for
        self._repeats = 0

    @property
    def wanted(self) -> bool:
        """Whether there is something to try."""
        learner = self._engine.worker.learner
        if self._run is not None or learner is None or learner.learning is None or learner.learning.over:
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
        self._course = None
        profile, to_run = learner.learn(), learner.learning.to_run()
        if to_run is not None:
            schedule, self._course = to_run
            if not self._course.runs:
                logger.info("magcache: %d steps, cached by a curve so far, are measured now", schedule.steps)
            number = len(PROMPTS) + self._course.runs  # with seeds of their own
            state_of = partial(learner.learning.state_of_run, schedule)
            self._try(None, number, {"num_inference_steps": schedule.steps, **self._course.asked}, state_of)
            return
        if profile is None:
            return
        if self._profile != profile:
            self._profile, self._measurement = profile, None
            self._plans = plans(profile) if profile.gains is not None else iter(())
        if next(self._plans, None) is not None:  # a moment for each, between which somebody may come
            return
        if self._measurement is None:
            self._measurement, self._results, self._exact = _next(profile), [], {}
            logger.info("magcache: %s of %s, when nobody waits", self._measurement.name, profile.name)
        if not self._measurement.trials:
            self._read([])
            return
        trial = self._measurement.trials[len(self._results)]
        if self._exact.get(trial.picture, (None,))[0] != trial.prompt:
            trial = Trial(trial.prompt, picture=trial.picture)
        steps = len(profile.ratios)
        asked = {"num_inference_steps": steps, **profile.provenance.get("asked", {})}
        if trial.steps is not None:
            asked["num_inference_steps"] = asked_steps(
                trial.steps, asked["num_inference_steps"] or self._info.defaults.get("num_inference_steps"), steps
            )
        plan_of = trial.plan or _uncached
        self._try(trial, trial.prompt, asked, plan_of if trial.steps is not None else _as_measured(profile, plan_of))

    def _try(self, trial: Trial | None, number: int, asked: Mapping[str, Any], plan_of: PlanOf) -> None:
        prompt, given = sample_prompt(self._info, self._prompts[number % len(PROMPTS)], asked)
        params = OmniDiffusionSamplingParams(
            seed=FIRST_SEED + number,
            output_type="np" if trial is not None and trial.picture else "latent",
            cache="off",  # it has a plan of its own: what the engine's settings would refuse is nothing to it
            **given,
        )
        request = OmniDiffusionRequest(f"trial-{next(self._numbers)}\0", prompt, normalise_prompt(prompt), params)
        self._engine.try_out(request, plan_of)
        self._run = _UnderWay(request.request_id, trial, self._course)

    def takes(self, output: OmniRequestOutput) -> bool:
        """Take in a trial's end; False if the output is somebody's."""
        if self._run is None or output.request_id != self._run.request_id:
            return False
        run, self._run = self._run, None
        if not isinstance(output.error, RequestAbortedError):  # else it is begun again when there is time
            self._guarded(partial(self._take, run, output))
        return True

    def _guarded(self, act: Callable[[], None]) -> None:
        """What goes wrong in a trial ends them, and nothing else; what is against one profile leaves that one alone."""
        try:
            act()
        except (InvalidValueError, DeviceMemoryError) as error:
            self._leave(error)
        except Exception as error:
            refuse_lost(error)
            self._give_up(error)

    def _take(self, run: _UnderWay, output: OmniRequestOutput) -> None:
        if run.course is not None:
            run.course.runs += 1
        trial, held = run.trial, None if run.trial is None else self._exact.get(run.trial.picture)
        compared = held is not None and trial is not None and held[0] == trial.prompt
        if output.error is not None and not (compared and isinstance(output.error, NumericalError)):
            raise output.error
        if trial is None:
            return
        if held is None or not compared:
            self._exact[trial.picture] = trial.prompt, _values(output)
            return
        if output.plan is not None and output.skipped_steps != output.plan.count(False):
            self._repeats += 1  # its residuals had no room
            if self._repeats > MOST_REPEATS:
                budget = self._engine.worker.store.budget
                raise InvalidValueError("memory_budget_mb", budget and budget >> 20, "has no room for its residuals")
            return
        if output.error is None:
            away = Away.between(_values(output), held[1], trial.kept)
        else:
            away = Away.of(float("nan"), held[1].pow(2).mean().item())
        refuse_noise(trial, away, type(self._engine.worker.pipeline.scheduler).__name__)
        self._results.append(away)
        self._repeats = 0
        assert self._measurement is not None
        if len(self._results) == len(self._measurement.trials):
            self._read(self._results)

    def _read(self, results: Sequence[Away]) -> None:
        """Take in what the results say: more of the profile, or what else is to be tried."""
        assert self._measurement is not None and self._profile is not None
        found = self._measurement.read(results)
        if isinstance(found, Measurement):
            self._measurement, self._results = found, []
        elif found == self._profile:
            raise InvalidValueError("profile", found.name, "leaves nothing to try")
        else:
            self._finish(found)

    def _drop(self) -> None:
        """Let go of what was measured of the profile at hand."""
        self._measurement, self._results, self._exact, self._profile, self._repeats = None, [], {}, None, 0

    def _finish(self, profile: CacheProfile) -> None:
        learner = self._engine.worker.learner
        self._drop()
        if learner is not None:
            learner.learnt(profile)
            if not profile.lacks:
                logger.info("magcache: %s is complete: its budgets have decibels", profile.name)

    def stop(self) -> None:
        """End the trial under way: something is to be done to the engine. It is run again later."""
        if self._run is not None:
            self._engine.abort([self._run.request_id])

    def forget(self) -> None:
        """Drop what was measured: the model has other weights now."""
        self._drop()
        self._tell(over=False)

    def _leave(self, error: Exception) -> None:
        """Make no more runs for what the last one was for."""
        learner, profile = self._engine.worker.learner, self._profile
        if self._course is not None:
            self._course.runs = MOST_RUNS
            logger.warning("magcache: a schedule of its requests is left to the curve: %s", error)
        elif profile is not None and learner is not None and learner.learning is not None:
            learner.learning.left.add(profile)
            logger.warning("magcache: %s stays without %s: %s", profile.name, " and ".join(profile.lacks), error)
            self._drop()

    def _give_up(self, error: Exception) -> None:
        self.end(f"one failed ({type(error).__name__}: {error})")

    def end(self, why: str) -> None:
        """Make no more trials; profiles stay as they are."""
        self._drop()
        if self._tell(over=True):
            logger.warning("magcache: no more trials: %s; profiles stay as they are", why)

    def _tell(self, over: bool) -> bool:
        """Let requests know whether what needs runs is going to come; returns whether anything is learnt at all."""
        learner = self._engine.worker.learner
        if learner is None or learner.learning is None:
            return False
        learner.learning.over = over
        return True


def _uncached(schedule: Schedule) -> None:
    """No plan: every step computes."""


def _as_measured(profile: CacheProfile, plan_of: PlanOf) -> PlanOf:
    """`plan_of` for the profile's own schedule; of another it would say nothing that holds."""

    def plan(schedule: Schedule) -> Any:
        if not profile.is_of(schedule):
            ours, theirs = (f"{one.steps} steps, switches {one.switches}" for one in (schedule, profile.schedule))
            raise InvalidValueError("schedule", ours, f"of a run of its own is another than the profile's ({theirs})")
        return plan_of(schedule)

    return plan


def _next(profile: CacheProfile) -> Measurement[CacheProfile]:
    """What a learnt profile lacks first."""
    if profile.gains is None:
        return gains(profile, GAIN_PROMPTS)
    if not profile.tuned:
        return tuned_weights(profile, TUNED_ON, GAIN_PROMPTS)
    return figures(profile, JUDGED_ON, GAIN_PROMPTS + TUNED_ON)


def _values(output: OmniRequestOutput) -> torch.Tensor:
    """The final latents, or what they were decoded to."""
    return values(output) if output.latents is None else output.latents.float().cpu()
