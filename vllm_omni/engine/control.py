"""What can be done to an engine between two steps: adapters, sleep, weights, traces. Knows no wire and no HTTP."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.engine import weights
from vllm_omni.engine.interface import EngineCondition
from vllm_omni.engine.malloc import return_freed_memory
from vllm_omni.engine.wire import (
    Action,
    LoadAdapter,
    Sleep,
    StartProfile,
    StopProfile,
    UnloadAdapter,
    UpdateWeights,
    Wake,
)
from vllm_omni.errors import ConflictError, InvalidValueError, ModelLoadError, OmniError, UnknownAdapterError
from vllm_omni.kernels.device import is_out_of_memory, refuse_lost
from vllm_omni.logger import init_logger, told

logger = init_logger(__name__)

SLEEP_LEVELS = (1, 2)


class EngineControl:
    """Does `Action`s, one after another. An action that raises has changed nothing."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self._engine, self._config = engine, engine.config
        self._adapters = engine.worker.runner.adapters
        self._prompts = engine.worker.runner.prompts
        self._own = frozenset(engine.config.lora_modules)  # never pushed out
        self._leaving: set[str] = set()  # unloaded, and still used by requests that had been accepted
        self._weights: dict[str, str] = {}  # of components that were updated, where from; the latest last
        self._asleep = 0
        self._wake: Callable[[], None] = lambda: None
        self._profile: tuple[profile, Path] | None = None
        self._steps_left = 0

    @property
    def condition(self) -> EngineCondition:
        adapters, profiling = dict(self._adapters.loaded), self._profile is not None
        return EngineCondition(adapters, dict(self._weights), self._asleep, profiling)

    def may_do(self, action: Action) -> bool:
        """Whether the action can be done now; if not, the requests that must end first get room to do so."""
        scheduler = self._engine.scheduler
        if isinstance(action, Sleep):
            self._engine.asleep = True
            return not len(scheduler)
        scheduler.held = isinstance(action, UpdateWeights) and bool(scheduler.running)
        return not scheduler.held

    def do(self, action: Action) -> None:
        """Do it; ConflictError, InvalidValueError or ModelLoadError says why it is not done."""
        if self._asleep and not isinstance(action, Sleep | Wake):
            raise ConflictError("the engine is asleep; wake it up first")
        self._engine.worker.runner.components.quiet()
        match action:
            case LoadAdapter(name, path, keep):
                self._load(name, path, self._own.union(keep))
            case UnloadAdapter(name):
                self._unload(name)
            case Sleep(level):
                self._sleep(level)
            case Wake():
                self._wake_up()
            case UpdateWeights(path, modules):
                replaced = weights.update(self._engine.worker.pipeline, Path(path), modules)
                kept = {name: folder for name, folder in self._weights.items() if name not in replaced}
                self._weights = kept | dict.fromkeys(replaced, path)
                self._prompts.clear()
                self._engine.worker.weights_changed()
            case StartProfile(folder, steps):
                self._start_profile(Path(folder), steps)
            case StopProfile():
                self._stop_profile()

    def after_step(self) -> bool:
        """Do what was to be done once a step had ended; True if the condition has changed by itself."""
        if self._leaving:
            for name in self._leaving - self._engine.adapters_in_use():
                self._remove(name)
        if self._profile is None or not self._engine.worked:
            return False
        self._steps_left -= 1
        if self._steps_left:
            return False
        try:
            self._stop_profile()
        except OSError as error:
            logger.error("the trace could not be written: %s", error)
        return True

    def restore(self, condition: EngineCondition) -> None:
        """Bring a new engine to the condition of the one before it, as far as that goes: what is gone is logged."""
        actions: list[Action] = [UpdateWeights(folder, [name]) for name, folder in condition.weights.items()]
        for name in self._own:
            if condition.adapters.get(name) != self._adapters.loaded.get(name):  # unloaded since, or another one's name
                self._remove(name)
        there = self._adapters.loaded
        actions += [LoadAdapter(name, path) for name, path in condition.adapters.items() if name not in there]
        actions += [Sleep(condition.asleep)] if condition.asleep else []
        for action in actions:
            try:
                self.do(action)
            except Exception as error:  # what goes wrong once goes wrong in every process that follows
                refuse_lost(error)
                why = error if isinstance(error, OmniError) else told(error)
                logger.error("after a restart, %s could not be done again: %s", action, why)
        self._engine.asleep = self._asleep > 0

    def _load(self, name: str, path: str, kept: frozenset[str]) -> None:
        if name in self._adapters.loaded:
            raise InvalidValueError("lora_name", name, "must be new; unload the adapter of that name first")
        used = self._engine.adapters_in_use()
        if name in self._leaving:
            raise ConflictError(f"adapter {name!r} is being unloaded, and requests still use it; try again later")
        free = [other for other in self._adapters.loaded if other not in used and other not in kept]
        full = len(self._adapters.loaded) + len(self._leaving) >= self._config.max_loras
        if full and not free:
            raise ConflictError(f"all {self._config.max_loras} adapters are in use, set, or were given at start-up")
        self._adapters.load(name, path)
        if full:
            logger.info("adapter %s makes room for %s", free[0], name)
            self._remove(free[0])

    def _unload(self, name: str) -> None:
        if name not in self._adapters.loaded:
            raise UnknownAdapterError("lora_name", name, "must be the name of an adapter that is loaded")
        if name in self._engine.adapters_in_use():
            del self._adapters.loaded[name]
            self._leaving.add(name)
        else:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._adapters.remove(name)
        self._prompts.clear()  # the name may come again for something else
        self._leaving.discard(name)

    def _sleep(self, level: int) -> None:
        try:
            if level not in SLEEP_LEVELS:
                raise InvalidValueError("level", level, "must be 1 (weights to main memory) or 2 (weights dropped)")
            if level > self._asleep:
                pipeline = self._engine.worker.pipeline
                if level == 2:
                    if not self._engine.worker.from_folder:
                        raise ConflictError("the pipeline was not loaded by the engine; it can sleep at level 1 alone")
                    weights.drop(pipeline)
                elif level == 1:
                    self._wake = weights.to_host(pipeline)
                self._asleep = level
        finally:
            self._engine.asleep = self._asleep > 0
        self._prompts.clear()
        gc.collect()
        return_freed_memory()

    def _wake_up(self) -> None:
        if self._asleep == 2:
            try:
                weights.reload(self._config, self._engine.worker.pipeline, self._weights)
            except (ModelLoadError, InvalidValueError) as error:
                raise ConflictError(f"the weights cannot be read, and the engine stays asleep: {error}") from error
        try:
            self._wake()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ConflictError("the device has no room for the weights; free some, and wake it again") from None
        self._asleep, self._wake = 0, lambda: None
        self._engine.asleep = False

    def _start_profile(self, folder: Path, steps: int) -> None:
        if self._profile is not None:
            raise ConflictError("a trace is being made already; stop it first")
        if steps < 1:
            raise InvalidValueError("num_steps", steps, "must be 1 or more")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        folder.mkdir(parents=True, exist_ok=True)
        trace: Any = profile(activities=activities)
        trace.start()
        self._profile, self._steps_left = (trace, folder), steps

    def _stop_profile(self) -> None:
        if self._profile is None:
            raise ConflictError("no trace is being made; start one first")
        (trace, folder), self._profile = self._profile, None
        trace.stop()
        trace.export_chrome_trace(str(folder / f"trace-{time.time_ns()}-{os.getpid()}.json.gz"))
