"""Calibrated facts about a checkpoint: its magnitude curve and its residuals' Gram matrix, with their provenance.

A profile belongs to a checkpoint (a hub id, or a fingerprint of its weights), never to a class of models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from vllm_omni.diffusion.cache.plan.predictors import Terms
from vllm_omni.diffusion.cache.plan.schedule import Schedule, forced_steps
from vllm_omni.diffusion.cache.settings import as_curve
from vllm_omni.envs import profile_folder
from vllm_omni.errors import InvalidValueError
from vllm_omni.files import write_whole
from vllm_omni.logger import init_logger
from vllm_omni.settings import Settings

if TYPE_CHECKING:
    import torch

logger = init_logger(__name__)

PROFILE_DIR = Path(__file__).parent / "profiles"
MAX_PROFILE_BYTES = 64 * 2**20
FORMAT = 2
MAX_STEPS = 1000
_LEFT_OUT = ("predictors", "forwards", "branch_grams")  # what older profiles have, too
Forecasted = Literal["residual", "output"]  # what the blocks add, or what the denoiser returns
LARGEST = 1e12  # of any measured number: beyond it, squares and products overflow where nobody looks
LEARNT = "learnt"  # the kind, in its provenance, of a profile that an engine has made of its own requests


class MeasuredBudget(Settings):
    """What a plan of one number of full forwards is worth, with the steps and weights that runs of it have chosen.

    `terms` are the (anchor, weight) of each skipped step, chosen by where runs of this very schedule end
    (`vllm_omni.tuning`); empty: the planner's or the rule's, None: not tried. Decibels are PSNR to the uncached output
    that nine of ten keep, by `pairs` prompts and seeds that calibration had not seen (`trials.kept_by_most`): of this
    plan, of the planner's own mask and weights, of the published rule with reuse, and of an uncached run of as many
    steps, which may be nearer in the mean. None: not measured. `by_rule`: the rule was nearest of what is cached.
    """

    speedup: float = Field(ge=1, lt=LARGEST, allow_inf_nan=False)  # steps per full forward
    by_rule: bool = False
    terms: dict[int, Terms] | None = None
    pairs: int = Field(default=0, ge=0)
    psnr: float | None = Field(default=None, allow_inf_nan=False)
    psnr_mean: float | None = Field(default=None, allow_inf_nan=False)
    untuned_psnr: float | None = Field(default=None, allow_inf_nan=False)
    rule_psnr: float | None = Field(default=None, allow_inf_nan=False)
    fewer_steps_psnr: float | None = Field(default=None, allow_inf_nan=False)
    fewer_steps_are_nearer: bool = False

    def forwards(self, steps: int) -> int:
        """The full forwards of a run of so many steps."""
        return round(steps / self.speedup)

    def kept(self, tuned: bool) -> float | None:
        """The decibels that it keeps, where its own `terms` are used or where they are not."""
        return self.psnr if tuned or not self.terms else self.untuned_psnr


class CacheProfile(Settings):
    """`ratios` is gamma per step (1 first); `gram[s][t]` the mean of <r_s, r_t> over tokens, prompts and branches.

    `gains[t]` is how far the final latents end from the uncached run's per error of one in step t's residual and per
    unit of sigma that the step covers, `gain_errors` its standard error over prompts; both are joint over guidance
    branches. `output_gram` and `output_gains` are the same of the output that the scheduler gets, which guidance has
    made of all branches. `budgets` are what plans are worth, by ascending speed-up. `branches` holds the curve of each
    guidance branch.
    """

    format: int = FORMAT
    name: str = Field(min_length=1, max_length=200)
    transformer_class: str
    models: tuple[str, ...] = ()
    fingerprint: str | None = None
    ratios: tuple[float, ...]
    sigmas: tuple[float, ...] | None = None
    gram: tuple[tuple[float, ...], ...] | None = None
    gains: tuple[float, ...] | None = None
    gain_errors: tuple[float, ...] | None = None
    output_gram: tuple[tuple[float, ...], ...] | None = None
    output_gains: tuple[float, ...] | None = None
    budgets: tuple[MeasuredBudget, ...] = ()
    branches: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _format(cls, values: dict[str, Any]) -> dict[str, Any]:
        if (found := values.setdefault("format", FORMAT)) != FORMAT:
            raise InvalidValueError("format", found, f"must be {FORMAT}; calibrate again to have it in this one")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheProfile:
        """The profile of a mapping; budgets from before 2026-11-30 say nothing of the plans of today, and are left."""
        if isinstance(values, Mapping):
            budgets = values.get("budgets")
            older = isinstance(budgets, list) and any("predictor" in one for one in budgets if isinstance(one, Mapping))
            left = (*_LEFT_OUT, "budgets") if older else _LEFT_OUT
            values = {name: value for name, value in values.items() if name not in left}
        return super().from_dict(values)

    @field_validator("ratios", mode="before")
    @classmethod
    def _curve(cls, value: Any) -> Any:
        return as_curve("ratios", value)

    @field_validator("budgets", mode="before")
    @classmethod
    def _budgets(cls, value: Any) -> Any:
        return tuple(v if isinstance(v, MeasuredBudget) else MeasuredBudget.from_dict(v) for v in value)

    @field_validator("budgets", mode="after")
    @classmethod
    def _ascending(cls, value: tuple[MeasuredBudget, ...]) -> tuple[MeasuredBudget, ...]:
        speedups = [budget.speedup for budget in value]
        if speedups != sorted(set(speedups)):
            raise InvalidValueError("budgets", speedups, "must have speed-ups each above the one before")
        return value

    @model_validator(mode="after")
    def _shapes(self) -> CacheProfile:
        steps = len(self.ratios)
        if steps > MAX_STEPS:
            raise InvalidValueError("ratios", steps, f"must be of at most {MAX_STEPS} steps")
        for field, curve in {"ratios": self.ratios, **{f"branches.{b}": c for b, c in self.branches.items()}}.items():
            if len(curve) != steps or not all(1 / LARGEST < ratio < LARGEST for ratio in curve):
                fix = f"must be {steps} numbers between {1 / LARGEST:g} and {LARGEST:g}"
                raise InvalidValueError(field, curve, fix)
        if self.sigmas is not None and len(self.sigmas) != steps:
            raise InvalidValueError("sigmas", len(self.sigmas), f"must have one value per step, {steps}")
        for sigma in self.sigmas or ():
            if not 0 <= sigma < LARGEST:
                raise InvalidValueError("sigmas", sigma, f"must be noise levels from 0 to {LARGEST:g}")
        by_step = {"gains": self.gains, "gain_errors": self.gain_errors, "output_gains": self.output_gains}
        for field, values in by_step.items():
            if values is not None and (len(values) != steps or not all(0 <= value < LARGEST for value in values)):
                raise InvalidValueError(field, values, f"must be {steps} numbers from 0 to {LARGEST:g}")
        grams = {"gram": self.gram, "output_gram": self.output_gram}
        for field, rows in grams.items():
            if rows is not None:
                _check_gram(field, rows, steps)
        for budget in self.budgets:
            _check_terms(budget, self.schedule)
        if self.sigmas is None and any(values is not None for values in (*grams.values(), *by_step.values())):
            raise InvalidValueError("sigmas", None, "must be given with gram or gains")
        return self

    @property
    def forecasts(self) -> Forecasted:
        """What plans forecast: outputs if their matrix is known, for they need no forward and keep least."""
        return "residual" if self.output_gram is None else "output"

    def gram_of(self, what: Forecasted) -> tuple[tuple[float, ...], ...] | None:
        """The matrix for planning forecasts of residuals, or of outputs."""
        return self.gram if what == "residual" else self.output_gram

    def gains_of(self, what: Forecasted) -> tuple[float, ...] | None:
        """The gains that go with `gram_of`."""
        return self.gains if what == "residual" else self.output_gains

    def curve_alone(self) -> CacheProfile:
        """The same without all that was measured beside the curve."""
        measured = ("gram", "gains", "gain_errors", "output_gram", "output_gains")
        return self.model_copy(update=dict.fromkeys(measured) | {"budgets": ()})

    def budget_at(self, forwards: int | None = None) -> MeasuredBudget | None:
        """The one measured at the number of full forwards nearest to this, in ratio; None if none was."""
        speedup = len(self.ratios) / (forwards or len(self.ratios))
        return min(self.budgets, key=lambda budget: abs(math.log(budget.speedup / speedup)), default=None)

    def is_of(self, schedule: Schedule) -> bool:
        """Whether it was measured on this very schedule."""
        own = self.schedule
        if not len(own.sigmas) == len(schedule.sigmas) == schedule.steps or own.switches != schedule.switches:
            return False
        return np.allclose(own.sigmas, schedule.sigmas, rtol=1e-4, atol=1e-5)

    @property
    def schedule(self) -> Schedule:
        """What it was measured on; its provenance knows the switches between denoisers."""
        switches = self.provenance.get("switches")
        return Schedule(len(self.ratios), self.sigmas or (), tuple(switches) if isinstance(switches, list) else ())

    @property
    def tuned(self) -> bool:
        """Whether every budget's weights have been tuned, or tried."""
        return bool(self.budgets) and all(budget.terms is not None for budget in self.budgets)

    @property
    def has_figures(self) -> bool:
        """Whether a quality budget can be asked for."""
        return any(budget.psnr is not None for budget in self.budgets)

    def speedup_for(self, psnr: float, tuned: bool = True) -> float | None:
        """The largest measured speed-up that keeps so many decibels; None if none does, or is known."""
        measured = ((budget.speedup, budget.kept(tuned)) for budget in self.budgets)
        return max((speedup for speedup, kept in measured if kept is not None and kept >= psnr), default=None)

    @property
    def lacks(self) -> list[str]:
        """What a profile made today has and this one has not."""
        has = {"matrix": self.gram is not None, "gains": self.gains is not None}
        has |= {"tuned weights": self.tuned, "figures": self.has_figures}
        return [name for name, found in has.items() if not found]

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint, self.ratios))

    def save(self, path: Path) -> None:
        """Write the profile as a file, whole or not at all."""
        write_whole(path, lambda to: to.write(self.model_dump_json(indent=1).encode() + b"\n"))


def _check_gram(field: str, rows: tuple[tuple[float, ...], ...], steps: int) -> None:
    matrix = np.asarray(rows, dtype=np.float64) if len({len(row) for row in rows}) == 1 else np.empty(0)
    if matrix.shape != (steps, steps) or not (np.abs(matrix) < LARGEST).all():
        raise InvalidValueError(field, matrix.shape, f"must be a {steps} x {steps} matrix of numbers below {LARGEST:g}")
    lowest = -1e-3 * matrix.trace() / steps
    symmetric = np.allclose(matrix, matrix.T, rtol=1e-3)
    if not symmetric or np.diag(matrix).min() < 0 or np.linalg.eigvalsh(matrix)[0] < lowest:
        raise InvalidValueError(field, matrix.shape, "must be symmetric and positive semi-definite")


def _check_terms(budget: MeasuredBudget, schedule: Schedule) -> None:
    """A skipped step is made of computed ones of its denoiser before it; as many compute as the speed-up says."""
    if not (terms := budget.terms):
        return
    steps, skipped = schedule.steps, schedule.steps - budget.forwards(schedule.steps)
    begins = {step: part.start for part in schedule.segments for step in terms if part.start <= step < part.stop}
    anchors = [(step, *term) for step, own in terms.items() for term in own]
    fits = all(begins.get(t, t) <= a < t and a not in terms and abs(weight) < LARGEST for t, a, weight in anchors)
    forced = forced_steps(steps, True, schedule.switches) & terms.keys()
    if not fits or forced or len(terms) != skipped or not all(terms.values()):
        fix = f"must make each of {skipped} skipped steps of {steps} from computed ones before it"
        raise InvalidValueError("budgets.terms", terms, fix)


def load_profile(path: Path) -> CacheProfile:
    """Read a profile file; `InvalidValueError` naming the file and what is wrong with it."""
    if not path.is_file():
        raise InvalidValueError("profile", str(path), "must be a profile file, or a name such as 'demo'")
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise InvalidValueError("profile", str(path), f"must be smaller than {MAX_PROFILE_BYTES >> 20} MiB")
        content = json.loads(path.read_text())
    except InvalidValueError:
        raise
    except OSError as error:
        raise InvalidValueError("profile", str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # torn, not text, a number or nesting without end
        raise InvalidValueError("profile", str(path), f"must hold a complete JSON profile ({error})") from None
    try:
        if isinstance(content, dict) and "format" not in content:
            content["format"] = 1  # files of the first format did not say so
        return CacheProfile.from_dict(content)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidValueError("profile", str(path), f"must hold a valid profile ({error})") from None


def profile_names(transformer_class: str | None = None) -> list[str]:
    """The shipped profiles; with a class, those of its checkpoints."""
    names = sorted(file.stem for file in PROFILE_DIR.glob("*.json"))
    return [n for n in names if transformer_class in (None, shipped_profile(n).transformer_class)]


@cache
def shipped_profile(name: str) -> CacheProfile:
    """A profile that comes with the package."""
    return load_profile(PROFILE_DIR / f"{name}.json")


def named_profile(name: str) -> CacheProfile:
    """A shipped profile by name, or a file by path."""
    if name in profile_names():
        return shipped_profile(name)
    path = Path(name)
    return _loaded(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=32)
def _loaded(path: Path, changed: int) -> CacheProfile:
    return load_profile(path)


def find_profiles(model_name: str, fingerprint: str) -> tuple[CacheProfile, ...]:
    """The profiles of this very checkpoint: by the hash of its weights, or, of those without a hash, by hub id.

    The user's own (`profile_folder()`) come first, then those in the model's folder (`cache_profiles/`), then those
    that come with the package. Learnt ones hold for some schedules alone: those by hub id come after them, for the
    others. A file that cannot be read is passed over with a warning.
    """
    beside = _profiles_in(Path(model_name) / "cache_profiles") if model_name else []
    profiles = [*_profiles_in(profile_folder()), *beside, *(shipped_profile(name) for name in profile_names())]
    known = tuple(p for p in profiles if p.fingerprint == fingerprint)
    if all(p.provenance.get("kind") == LEARNT for p in known):
        known += tuple(p for p in profiles if p.fingerprint is None and model_name in p.models)
    return known


def _profiles_in(folder: Path) -> list[CacheProfile]:
    """The newest first."""
    profiles, files = [], []
    for file in folder.glob("*.json"):
        with suppress(OSError):  # gone by now, or a link to nothing
            files.append((file.stat().st_mtime_ns, file))
    for changed, file in sorted(files, reverse=True):
        try:
            profiles.append(_loaded(file, changed))
        except InvalidValueError as error:
            logger.warning("passed over: %s", error)
    return profiles


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of the weights' names, shapes and a few values of each, read in bfloat16: the same in fp32 and bfloat16.

    Not always in float16, whose small values are others: calibrate what you serve.
    LoRA adapters beside the weights do not count: a request may run without them.
    """
    import torch  # only here: that a profile's name is wrong shows before seconds of imports

    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters(), key=lambda pair: pair[0].replace(".base_layer", "")):
        if ".lora_" in name:
            continue
        digest.update(f"{name.replace('.base_layer', '')}{tuple(weight.shape)}".encode())
        # A quantised weight's class may not let single values be read, and offloading leaves a shape without values.
        if type(weight.data) is torch.Tensor and not weight.is_meta:
            few = weight.detach().flatten()[:4].to(device="cpu", dtype=torch.bfloat16).float()
            digest.update(few.numpy().tobytes())
    return digest.hexdigest()[:32]
