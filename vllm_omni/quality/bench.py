"""Draws rows and times them: one loaded model, our engine over it, and the peers on copies that share its weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.cache.plan.curve import resample
from vllm_omni.diffusion.cache.profile import find_profiles, fingerprint
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import load_pipeline
from vllm_omni.diffusion.worker.arguments import arguments_of
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import InvalidValueError, check_keys
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.learning import nearest
from vllm_omni.model_folder import generation_defaults
from vllm_omni.quality.meter import Work, metered
from vllm_omni.quality.metrics import compare
from vllm_omni.quality.pairs import Pair
from vllm_omni.quality.peers import PEERS, tune
from vllm_omni.quality.rows import Row, reference

BATCH = 16


@dataclass(frozen=True)
class BenchModel:
    """What to load, and the arguments every picture is drawn with."""

    name: str
    dtype: Any = "auto"
    device: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """One row, drawn. `nfe` and `work` are of one picture, in full forwards (of `steps`); lists have one per pair."""

    row: Row
    nfe: float
    work: float
    metrics: dict[str, list[float]]
    seconds: float  # that drawing and measuring took, for all pairs
    times_measured: float | None = None
    sheet: str = ""  # file of its first pictures

    @property
    def times_ideal(self) -> float:
        return self.row.steps / self.work


class Bench:
    """`draw` gives pictures and work, `measure` a `Result`, `clock` speed-ups of single pictures."""

    def __init__(self, model: BenchModel, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        config = OmniDiffusionConfig(model=model.name, dtype=model.dtype, device=model.device)
        self.pipeline = load_pipeline(config)
        check_keys(type(self.pipeline).__name__, model.arguments, arguments_of(type(self.pipeline)))
        self.arguments = generation_defaults(model.name) | model.arguments
        self.omni = Omni.from_pipe(self.pipeline, defaults=self.arguments, max_num_seqs=BATCH)
        self.arguments.pop("num_inference_steps", None)

    def close(self) -> None:
        self.omni.close()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.pipeline.transformer)

    @property
    def profiles(self) -> str:
        """A hash of all that is known of the checkpoint: it changes with each calibration."""
        found = find_profiles(str(self.pipeline.config.get("_name_or_path", "")), self.fingerprint)
        return sha256("".join(profile.model_dump_json() for profile in found).encode()).hexdigest()

    def ratios(self, steps: int) -> tuple[float, ...]:
        """The checkpoint's magnitude curve at `steps`. InvalidValueError where it has no profile."""
        name = str(self.pipeline.config.get("_name_or_path", ""))
        profile = nearest(find_profiles(name, self.fingerprint), steps)
        if profile is None:
            fix = "has no profile of its own: measure one with `vllm-omni calibrate`, or give --settings"
            raise InvalidValueError("MODEL", name, fix)
        return tuple(resample(profile.ratios, steps, "log"))

    def draw(self, row: Row, pairs: Sequence[Pair]) -> tuple[np.ndarray, Work]:
        """Pictures in [0, 1], (pairs, [frames,] height, width, 3), and the work of all of them."""
        if row.peer is None:
            with metered(self.pipeline) as work:
                return self._engine(row, pairs), work
        assert row.strength is not None
        pipeline = PEERS[row.peer].on(self.pipeline, row.steps, row.strength, self.arguments)
        size = BATCH if PEERS[row.peer].joint else 1
        with metered(pipeline) as work:
            parts = [self._plain(pipeline, row.steps, pairs[i : i + size]) for i in range(0, len(pairs), size)]
        return np.concatenate(parts), work

    def measure(self, row: Row, pairs: Sequence[Pair], exact: np.ndarray, whole: Work) -> tuple[Result, np.ndarray]:
        """`row` against the uncached pictures `exact`, whose work was `whole`; also its pictures."""
        began = time.perf_counter()
        pictures, work = self.draw(row, pairs)
        nfe = row.steps * work.full / whole.full
        result = Result(row, nfe, row.steps * work.done / whole.done, compare(pictures, exact), 0.0)
        result.seconds = time.perf_counter() - began
        return result, pictures

    def tune(self, peer: str, steps: int, pairs: Sequence[Pair], targets: Sequence[float]) -> list[float]:
        """The peer's strengths that come nearest to the target speed-ups in block work."""
        _, whole = self.draw(reference(steps), pairs)

        def speedup(strength: float) -> float:
            _, work = self.draw(Row(peer, peer, steps, peer=peer, strength=strength), pairs)
            return whole.done / work.done

        return tune(speedup, PEERS[peer].strengths, targets)

    def clock(self, rows: Sequence[Row], pairs: Sequence[Pair]) -> list[float]:
        """How many times faster than the plain pipeline, uncached, each row draws one picture alone.

        Interleaved: for every pair the uncached run and each row once, and the other way round for the next; the median
        of the pairs' ratios. All rows are of one step count.
        """
        jobs = [self._solo(row) for row in (reference(rows[0].steps), *rows)]
        for job in jobs:
            job(pairs[0])  # once for warmth
        ratios: list[list[float]] = [[] for _ in rows]
        for number, pair in enumerate(pairs):
            seconds = [0.0] * len(jobs)
            for place in list(range(len(jobs)))[:: -1 if number % 2 else 1]:
                began = time.perf_counter()
                jobs[place](pair)
                seconds[place] = time.perf_counter() - began
            for place, taken in enumerate(seconds[1:]):
                ratios[place].append(seconds[0] / taken)
        return [statistics.median(each) for each in ratios]

    def _solo(self, row: Row) -> Callable[[Pair], Any]:
        if row == reference(row.steps):
            return lambda pair: self._plain(self.pipeline, row.steps, [pair])
        if row.peer is None:
            return lambda pair: self._engine(row, [pair])
        assert row.strength is not None
        pipeline = PEERS[row.peer].on(self.pipeline, row.steps, row.strength, self.arguments)
        return lambda pair: self._plain(pipeline, row.steps, [pair])

    def _engine(self, row: Row, pairs: Sequence[Pair]) -> np.ndarray:
        steps = row.run_steps or row.steps
        params = [
            OmniDiffusionSamplingParams(
                num_inference_steps=steps, seed=pair.seed, cache=row.request_cache, output_type="np"
            )
            for pair in pairs
        ]
        outputs = self.omni.generate([pair.prompt for pair in pairs], params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return np.stack([(output.images or output.videos)[0] for output in outputs])

    def _plain(self, pipeline: Any, steps: int, pairs: Sequence[Pair]) -> np.ndarray:
        made = pipeline(
            prompt=[pair.prompt for pair in pairs],
            generator=[torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs],
            num_inference_steps=steps,
            output_type="np",
            **self.arguments,
        )
        return np.asarray(next(iter(made.values())))
