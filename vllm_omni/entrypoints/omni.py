"""Offline generation: prompts in, pictures out, in input order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidValueError, OmniError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.outputs import OmniRequestOutput

SamplingParams = OmniDiffusionSamplingParams | dict[str, Any]


class Omni:
    """`Omni("demo", cache_backend="magcache").generate("red apple")[0].images[0]`. A context manager."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        self.engine = DiffusionEngine(OmniDiffusionConfig(model=model, **engine_args))
        self._ids = itertools.count()

    @classmethod
    def from_pipe(cls, pipe: Any, *, defaults: dict[str, Any] | None = None, **engine_args: Any) -> Self:
        """An engine over a diffusers pipeline that is loaded already; `defaults` are its call's default arguments."""
        omni = cls.__new__(cls)
        name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        omni.engine = DiffusionEngine(OmniDiffusionConfig(model=name, **engine_args), pipe, defaults)
        omni._ids = itertools.count()
        return omni

    def generate(
        self,
        prompts: Any,
        sampling_params_list: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[OmniRequestOutput]:
        """One output per prompt, in input order. A prompt that fails gives an output with `.error`; the rest go on.

        `prompts`: a string, a dict (prompt, negative_prompt, prompt_embeds, ...), or a list of them.
        `sampling_params_list`: one for all, or one per prompt.
        """
        listed = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        parameters = self._parameters(sampling_params_list, len(listed))
        order: list[str] = []
        outputs: dict[str, OmniRequestOutput] = {}
        for prompt, params in zip(listed, parameters, strict=True):
            request_id = f"omni-{next(self._ids)}"
            order.append(request_id)
            try:
                params = (
                    params if isinstance(params, OmniDiffusionSamplingParams) else OmniDiffusionSamplingParams(**params)
                )
                self.engine.add_request(OmniDiffusionRequest(request_id, prompt, normalise_prompt(prompt), params))
            except OmniError as error:
                outputs[request_id] = OmniRequestOutput(request_id, prompt, error=error)
        with _Progress(len(listed), len(outputs), use_tqdm) as bar:
            try:
                while len(outputs) < len(listed):
                    for output in self.engine.step():
                        outputs[output.request_id] = output
                        bar.ended(output)
                    bar.show(self.engine)
            finally:
                self.engine.abort([i for i in order if i not in outputs])
        return [outputs[request_id] for request_id in order]

    @staticmethod
    def _parameters(given: Any, count: int) -> list[SamplingParams]:
        if given is None:
            return [OmniDiffusionSamplingParams()] * count
        if isinstance(given, OmniDiffusionSamplingParams | dict):
            return [given] * count
        one = OmniDiffusionSamplingParams | dict
        if not isinstance(given, list | tuple) or not all(isinstance(entry, one) for entry in given):
            raise InvalidValueError("sampling_params_list", given, "must be sampling parameters, or a list of them")
        if len(given) != count:
            raise InvalidValueError(
                "sampling_params_list", f"{len(given)} entries", f"must have one per prompt, {count}"
            )
        return list(given)

    def close(self) -> None:
        """Abort what runs and take the cache off the pipeline."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


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
