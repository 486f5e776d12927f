"""Text encoders and decoders: which of their calls are made as one, and where. Knows no cache and no denoiser."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from vllm_omni.diffusion.denoiser.lora_scales import has_adapters
from vllm_omni.diffusion.denoiser.rows import equal, row_slices
from vllm_omni.diffusion.worker.adapters import AdapterSwitch
from vllm_omni.diffusion.worker.coroutine import TEXT_ENCODERS, ComponentCall
from vllm_omni.diffusion.worker.memory import Retries
from vllm_omni.diffusion.worker.request import Request
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.beside import Beside, Elsewhere
from vllm_omni.kernels.device import DeviceClock, Memory, Span, is_out_of_memory, tried
from vllm_omni.kernels.placement import parts_of

# Input elements of a joint component call: the latents of one FLUX picture of 1024 by 1024. Decoding several small
# pictures at once must not need more memory than a large one does, and large ones fill the machine one by one.
MOST_JOINED = 2**18


class Runner(Protocol):
    """What the components' calls need of the runner."""

    @property
    def retries(self) -> Retries: ...
    @property
    def adapters(self) -> AdapterSwitch: ...
    @property
    def clock(self) -> DeviceClock: ...
    def go_on(self, request: Request, result: Any, joint: Span | float, sharing: int) -> None: ...
    def abort(self, request: Request, error: Exception) -> None: ...


class Components:
    """Runs the calls of a pipeline's text encoders and decoder: between two forwards, or elsewhere beside them."""

    def __init__(self, pipeline: Any, devices: Mapping[str, str], back: torch.device | None, runner: Runner) -> None:
        """`devices`: by option; InvalidValueError for one of which the pipeline has no part."""
        self._pipeline, self._runner = pipeline, runner
        parts = [vars(pipeline).get(name) for name in TEXT_ENCODERS]
        self.encoders = [module for module in parts if isinstance(module, torch.nn.Module)]
        self.elsewhere: dict[str, Elsewhere] = {}
        for option, device in devices.items():
            found = parts_of(pipeline, option)
            if back is None or any("_hf_hook" in vars(part) for part in found.values()):
                raise InvalidValueError(option, device, "is for diffusers pipelines without offloading; leave it out")
            there = torch.device(device)
            if back.type == "cuda" == there.type and (back.index or 0) == (there.index or 0):
                raise InvalidValueError(
                    option, device, "is the denoiser's own, where it would wait for it; leave it out"
                )
            self.elsewhere |= {name: Elsewhere(part, there, back) for name, part in found.items()}
        self.beside, self._returned = Beside(), list[Request]()

    def run(self, batch: Sequence[Request]) -> None:
        """One call, for as many as its size allows, then each of them goes on; the others wait for another turn.

        Calls made elsewhere are started all at once, and their requests go on in a later turn.
        """
        runner = self._runner
        for chunk in component_chunks([_call_of(request) for request in batch]):
            sharing = batch[chunk]
            if self._leaves(sharing):
                self._send(sharing)
                continue
            began = runner.clock.mark()
            results = runner.retries.each_or_errors(sharing, self._call)
            span = began, runner.clock.mark()
            for request, result in zip(sharing, results, strict=False):
                runner.go_on(request, result, span, len(sharing))
            return

    def take_back(self) -> list[Request]:
        """The requests that have gone on after a call made elsewhere."""
        self.beside.take()
        returned, self._returned = self._returned, []
        return returned

    def quiet(self) -> None:
        """Wait until no call is under way."""
        for part in self.elsewhere.values():
            part.quiet()

    def _call(self, batch: Sequence[Request]) -> list[Any]:
        calls = [_call_of(request) for request in batch]
        name = calls[0].component
        if name in TEXT_ENCODERS:  # one that had no adapters when the request began may have some now
            self._runner.adapters.use(batch[0].adapters)
        self.quiet()
        with batch[0].changes.installed():
            return call_component(getattr(self._pipeline, name), calls, self.elsewhere.get(name))

    def _leaves(self, batch: Sequence[Request]) -> bool:
        """Whether a call is made elsewhere; not if the component is another one for some requests than for others."""
        name = _call_of(batch[0]).component
        own = any(request.changes for request in batch)
        switched = name in TEXT_ENCODERS and any(map(has_adapters, self.encoders))
        return name in self.elsewhere and not own and not switched

    def _send(self, batch: Sequence[Request]) -> None:
        calls = [_call_of(request) for request in batch]
        part = self.elsewhere[calls[0].component]
        for request in batch:
            request.away = True
        self.beside.send(part, partial(_each_or_errors, part, calls), partial(self._back, batch))

    def _back(self, batch: Sequence[Request], results: Sequence[Any], seconds: float) -> None:
        for request, result in zip(batch, results, strict=True):
            if request.ended is not None:  # meanwhile
                continue
            request.away = False
            _, error = tried(partial(self._runner.go_on, request, result, seconds, len(batch)))
            if error is not None:
                self._runner.abort(request, error)
            self._returned.append(request)


def _each_or_errors(part: Elsewhere, calls: Sequence[ComponentCall]) -> list[Any]:
    """What each call returns or raises, of calls made as one if that works. In the module's thread."""
    results, failure = tried(lambda: call_component(part.module, calls, part))
    if failure is None:
        return results or []
    if len(calls) > 1:
        return [_each_or_errors(part, [call])[0] for call in calls]
    if is_out_of_memory(failure):
        memory = Memory(part.there)
        memory.collect()
        return [memory.too_large(failure, calls[0].component not in TEXT_ENCODERS, 0, 0)]
    return [failure]


def _call_of(request: Request) -> ComponentCall:
    assert isinstance(request.call, ComponentCall)
    return request.call


def component_key(call: ComponentCall) -> Hashable | None:
    """Equal keys fit together; None if a call has an argument that cannot be compared, such as a generator."""
    named = _by_name(call)
    tensors = [value for value in named.values() if isinstance(value, torch.Tensor)]
    if not tensors or any(not tensor.ndim or len(tensor) != len(tensors[0]) for tensor in tensors):
        return None
    try:
        described = tuple(
            (name, (value.shape[1:], value.dtype) if isinstance(value, torch.Tensor) else equal(value))
            for name, value in named.items()
        )
    except TypeError:
        return None
    return call.component, call.method, described


def component_chunks(calls: Sequence[ComponentCall]) -> Iterator[slice]:
    """Calls of one key, in runs of at most MOST_JOINED elements, a call at least."""
    elements = sum(value.numel() for value in _by_name(calls[0]).values() if isinstance(value, torch.Tensor))
    most = max(1, MOST_JOINED // max(1, elements))
    for first in range(0, len(calls), most):
        yield slice(first, first + most)


def call_component(module: Any, calls: Sequence[ComponentCall], elsewhere: Elsewhere | None = None) -> list[Any]:
    """What each call returns; several of one key are made as one, on the device where the module is."""
    first = calls[0]
    method = module if first.method == "__call__" else getattr(module, first.method)
    method = method if elsewhere is None else partial(elsewhere.moved, method)
    if len(calls) == 1:
        return [method(*first.args, **first.kwargs)]
    named = [_by_name(call) for call in calls]
    joined = {
        name: torch.cat([own[name] for own in named]) if isinstance(value, torch.Tensor) else value
        for name, value in named[0].items()
    }
    output = method(*(joined[i] for i in range(len(first.args))), **{name: joined[name] for name in first.kwargs})
    slices = row_slices([next(len(v) for v in own.values() if isinstance(v, torch.Tensor)) for own in named])
    return [_own_rows(output, rows, slices[-1].stop) for rows in slices]


def _by_name(call: ComponentCall) -> dict[int | str, Any]:
    """The arguments by position or name."""
    named: dict[int | str, Any] = dict(enumerate(call.args))
    return named | dict(call.kwargs)


def _own_rows(output: Any, rows: slice, total: int) -> Any:
    """One request's rows of a component's output, in memory of its own: embeddings live as long as their request.

    What is no tensor, such as a language model's key-value cache, holds everybody's rows and is left out. TypeError for
    a tensor without one entry per row: then each call must be made alone.
    """
    if isinstance(output, torch.Tensor):
        if not output.ndim or len(output) != total:
            raise TypeError(f"an output of shape {tuple(output.shape)} for {total} rows")
        return output[rows].clone()
    if isinstance(output, dict):
        return type(output)(**{name: _own_rows(value, rows, total) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_own_rows(value, rows, total) for value in output)
    return None
