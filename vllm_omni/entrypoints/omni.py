"""Offline generation: prompts in, pictures out, in input order."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tqdm import tqdm

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoiser.specs import denoisers_of
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.distributed.lockstep import control_of, open_engine
from vllm_omni.engine.describe import describe
from vllm_omni.engine.in_flight import refuse_after_fork
from vllm_omni.engine.learning import IdleLearning
from vllm_omni.engine.wire import Action, LoadAdapter, Sleep, UnloadAdapter, UpdateWeights, Wake
from vllm_omni.errors import (
    DeviceLostError,
    EngineAsleepError,
    EngineClosedError,
    EngineDeadError,
    InvalidValueError,
    OmniError,
    forget_locals,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt, own
from vllm_omni.kernels.device import refuse_lost
from vllm_omni.logger import init_logger
from vllm_omni.modular import whole
from vllm_omni.outputs import OmniRequestOutput

logger = init_logger(__name__)
WHILE_LOADING = {  # options that the loader alone carries out, and what its owner does to a pipeline instead
    "dtype": "call pipe.to(dtype)",
    "device": "call pipe.to(device)",
    "revision": "give it to from_pretrained",
    "enforce_eager": "call pipe.transformer.compile_repeated_blocks(dynamic=True)",
    "enable_cpu_offload": "call pipe.enable_model_cpu_offload()",
    "enable_layerwise_offload": "call pipe.enable_group_offload(device, offload_type='block_level')",
    "quantization": "call pipe.transformer.enable_layerwise_casting(storage_dtype, compute_dtype)",
    "attention_backend": "call pipe.transformer.set_attention_backend(name)",
    "vae_use_slicing": "call pipe.vae.enable_slicing()",
    "vae_use_tiling": "call pipe.vae.enable_tiling()",
}


class Omni:
    """`Omni("demo", cache_backend="magcache").generate("red apple")[0].images[0]`. A context manager.

    Several threads may call `generate`; they take turns.
    """

    def __init__(self, model: str | Path, **engine_args: Any) -> None:
        self._open(open_engine(OmniDiffusionConfig(model=model, **engine_args)))

    @classmethod
    def from_pipe(cls, pipe: Any, *, defaults: dict[str, Any] | None = None, **engine_args: Any) -> Self:
        """An engine over a diffusers pipeline that is loaded already; `defaults` are its call's default arguments."""
        omni = cls.__new__(cls)
        omni._open(engine_over(pipe, defaults, engine_args))
        return omni

    def _open(self, engine: DiffusionEngine) -> None:
        self.engine, self.control = engine, control_of(engine)
        self._ids = itertools.count()
        self._turn = threading.Lock()
        self._closing = self._broken = self._told = False
        self._caller: int | None = None  # the thread that is in `generate`
        self._pid = os.getpid()

    def generate(
        self,
        prompts: Any,
        sampling_params_list: Any = None,
        *,
        use_tqdm: bool = True,
        on_output: Callable[[int, OmniRequestOutput], None] = lambda *_: None,
    ) -> list[OmniRequestOutput]:
        """One output per prompt, in input order. A prompt that fails returns an output with `.error`; the rest go on.

        `prompts`: a string, a dict (prompt, negative_prompt, prompt_embeds, ...), or a list of them.
        `sampling_params_list`: ours, a dict of them, or vLLM's; one for all, or one per prompt. `on_output` is called
        with the prompt's place and the output as it ends; what it raises ends the call, as Ctrl-C does between steps.
        """
        self._refuse_inside("generate")
        listed = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        parameters = self._parameters(sampling_params_list, len(listed))
        requests = {f"omni-{next(self._ids)}": asked for asked in zip(listed, parameters, strict=True)}
        with self._driving(list(requests)) as interrupt:
            outputs = self._run(requests, use_tqdm, on_output, interrupt)
            if not self._told and self.engine.worker.learner is not None and self._idle.wanted:
                self._told = True
                logger.info("magcache: learn() makes the runs that the profile still lacks; a psnr waits for them")
        return [outputs[request_id] for request_id in requests]

    def learn(self) -> str:
        """Make, now, the runs that a server makes while nobody asks for anything, where `calibrate` is "auto".

        They finish what `generate` has taught. Returns what is still being learnt, in words, "" if nothing is. Ctrl-C
        ends it between two steps; a later call goes on with what is missing.
        """
        self._refuse_inside("learn")
        with self._driving([]) as interrupt:
            if self.engine.asleep:
                raise EngineAsleepError
            try:
                while self._idle.wanted:
                    self._idle.begin()
                    while self.engine.has_unfinished_requests():
                        for output in self.engine.step():
                            self._idle.takes(output)
                        if self._closing:
                            raise EngineClosedError("the engine was closed by another thread")
                        interrupt()
            finally:
                self._idle.stop()
                for output in self.engine.collect():
                    self._idle.takes(output)
        return self._idle.progress

    @cached_property
    def _idle(self) -> IdleLearning:
        return IdleLearning(self.engine, describe(self.engine, {}))

    @contextmanager
    def _driving(self, request_ids: list[str]) -> Iterator[Callable[[], None]]:
        """Within, nobody else drives the engine, and nothing is left in it afterwards.

        Yields what raises, between two steps, what a signal asked for.
        """
        with self._turn, _interrupted_between_steps() as interrupt:
            self._refuse_closed()
            self._caller, self._broken = threading.get_ident(), True  # until all of this call has left the engine
            try:
                yield interrupt
            finally:
                try:
                    self.engine.abort(request_ids)
                    self.engine.collect()
                    if self._closing:
                        self.engine.close()
                    self._broken = False
                finally:
                    self._caller = None

    def _refuse_inside(self, what: str) -> None:
        refuse_after_fork(self._pid)
        if self._caller == threading.get_ident():
            raise OmniError(f"{what} was called inside generate or learn, by a signal handler or a callback")

    def _refuse_closed(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine is closed")
        if self._broken:
            raise EngineDeadError("a step was interrupted and could not be undone; make a new engine")

    def _run(
        self,
        requests: dict[str, tuple[Any, Any]],
        use_tqdm: bool,
        on_output: Callable[[int, OmniRequestOutput], None],
        interrupt: Callable[[], None],
    ) -> dict[str, OmniRequestOutput]:
        """The outputs by id; `interrupt` raises, between two steps, what a signal asked for."""
        outputs: dict[str, OmniRequestOutput] = {}
        places = {request_id: place for place, request_id in enumerate(requests)}
        for request_id, (prompt, params) in requests.items():
            try:
                self._add(request_id, prompt, params)
            except Exception as error:  # whatever a value of the wrong kind raises is that prompt's fault alone
                if not isinstance(error, OmniError):
                    refuse_lost(error)
                    forget_locals(error)
                outputs[request_id] = OmniRequestOutput(request_id, prompt, error=error)
                on_output(places[request_id], outputs[request_id])
        with _Progress(len(requests), len(outputs), use_tqdm) as bar:
            while len(outputs) < len(requests):
                if self._closing:
                    raise EngineClosedError("the engine was closed by another thread")
                for output in self._step(requests.keys() - outputs.keys()):
                    forget_locals(output.error)
                    if output.request_id in requests:
                        outputs[output.request_id] = output
                        bar.ended(output)
                        on_output(places[output.request_id], output)
                bar.show(self.engine)
                interrupt()
        return outputs

    def _step(self, waiting: Collection[str]) -> list[OmniRequestOutput]:
        """What the engine's step ends; if its device is lost, all that wait."""
        try:
            return self.engine.step()
        except DeviceLostError as error:
            return [OmniRequestOutput(request_id, error=error) for request_id in waiting]

    def _add(self, request_id: str, prompt: Any, params: Any) -> None:
        params = OmniDiffusionSamplingParams.from_params(params)
        request = OmniDiffusionRequest(request_id, prompt, own(normalise_prompt(prompt)), own(params))
        self.engine.add_request(request)

    @staticmethod
    def _parameters(given: Any, count: int) -> list[Any]:
        if not isinstance(given, list | tuple):
            return [OmniDiffusionSamplingParams() if given is None else given] * count
        if len(given) != count:
            raise InvalidValueError(
                "sampling_params_list", f"{len(given)} entries", f"must have one per prompt, {count}"
            )
        return list(given)

    def sleep(self, level: int = 1) -> None:
        """Give back the device's memory: level 1 keeps the weights in main memory, level 2 reads them again later.

        Until `wake_up`, requests end with EngineAsleepError.
        """
        self._control(Sleep(level))

    def wake_up(self) -> None:
        """End the sleep; ConflictError if the weights cannot be read, and then it sleeps on."""
        self._control(Wake())

    @property
    def is_sleeping(self) -> bool:
        return self.control.condition.asleep > 0

    def load_lora_adapter(self, name: str, path: str) -> None:
        """Load one more adapter by a new name."""
        self._control(LoadAdapter(name, path))

    def unload_lora_adapter(self, name: str) -> None:
        """Take an adapter off the model."""
        self._control(UnloadAdapter(name))

    def update_weights_from_disk(self, path: str, target_modules: list[str] | None = None) -> None:
        """Replace weights by those of a model's folder, of all components that it has or of those named."""
        self._control(UpdateWeights(path, target_modules))

    def _control(self, action: Action) -> None:
        self._refuse_inside("this")
        with self._turn:
            self._refuse_closed()
            self.control.do(action)
            if isinstance(action, UpdateWeights):
                self._idle.forget()

    def close(self) -> None:
        """Abort what runs, whichever thread asked for it, and take the cache off the pipeline."""
        if os.getpid() != self._pid:
            return
        self._closing = True
        if self._caller != threading.get_ident():  # else a signal handler calls, and `generate` closes on its way out
            with self._turn:
                self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def engine_over(pipe: Any, defaults: dict[str, Any] | None, engine_args: dict[str, Any]) -> DiffusionEngine:
    """An engine over a diffusers pipeline that is loaded already."""
    pipe, name = whole(pipe), str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    own = {"prompt_cache_mb": 0} | engine_args  # its owner may change an encoder at any time
    config = OmniDiffusionConfig(model=name, **own)
    if (ranks := config.parallel_config.ranks) > 1:
        fix = "needs a model that every rank can load; give a folder or a hub id to Omni(...)"
        raise InvalidValueError("parallel_config", f"{ranks} ranks", fix)
    _refuse_loading(pipe, config)
    return DiffusionEngine(config, pipe, defaults)


def _refuse_loading(pipe: Any, config: OmniDiffusionConfig) -> None:
    """InvalidValueError for an option of loading, unless the pipeline is as it says."""
    denoisers = denoisers_of(pipe).values()
    weights = [weight for denoiser in denoisers for weight in denoiser.parameters()]
    offloaded = any("_hf_hook" in vars(denoiser) for denoiser in denoisers)  # by accelerate
    as_it_is: dict[str, set[Any]] = {
        "dtype": {str(weight.dtype).removeprefix("torch.") for weight in weights},
        "device": {name for weight in weights for name in (str(weight.device), weight.device.type)},
    }
    if offloaded:
        as_it_is |= {"enable_cpu_offload": {True}, "device": {config.device}}
    for option, instead in WHILE_LOADING.items():
        value = vars(config)[option]
        if value not in (OmniDiffusionConfig.model_fields[option].default, *as_it_is.get(option, ())):
            fix = f"is applied while a model is loaded, and this one is already; {instead} before from_pipe instead"
            raise InvalidValueError(option, value, fix)


@contextmanager
def _interrupted_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that this yields is called: a step that is cut short leaves half its work.

    A second Ctrl-C is not held back. Python runs handlers in the main thread alone: in any other, nothing is held back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            deliver()

    def deliver() -> None:
        if held:
            number, frame = held[-1]
            held.clear()
            handler(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, handler)
        deliver()


class _Progress:
    """Requests done, and the steps computed and skipped so far."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        self._bar = tqdm(total=total, initial=done, unit="request", disable=not show, desc="generate", mininterval=0.2)
        self._computed = self._skipped = self._ticks = 0

    def ended(self, output: OmniRequestOutput) -> None:
        self._computed += output.computed_steps
        self._skipped += output.skipped_steps
        self._bar.update()

    def show(self, engine: DiffusionEngine) -> None:
        self._ticks += 1
        if self._bar.disable or self._ticks % 8:
            return
        running = engine.progress()
        computed = self._computed + sum(r.computed_steps for r in running)
        skipped = self._skipped + sum(r.skipped_steps for r in running)
        self._bar.set_postfix(running=len(running), computed=computed, skipped=skipped, refresh=False)
        self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.set_postfix(computed=self._computed, skipped=self._skipped)
        self._bar.close()
