"""A request as a coroutine: an unmodified diffusers pipeline in a greenlet of its own.

It parks at every call of its denoiser, of its text encoders, and of its VAE's decoder.

Knows nothing of batches and caches. The caller must hold `torch.inference_mode()` around every resume: grad mode is
thread-local and greenlets share the thread, so a pipeline's own `no_grad` would otherwise leak into its neighbours.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from greenlet import GreenletExit, greenlet

from vllm_omni.diffusion.denoiser.lora_scales import has_adapters
from vllm_omni.diffusion.denoiser.specs import DENOISER_NAMES, denoisers_of
from vllm_omni.diffusion.denoiser.step_tracker import own_schedulers
from vllm_omni.errors import NumericalError
from vllm_omni.kernels.beside import Elsewhere
from vllm_omni.kernels.placement import COMPONENTS
from vllm_omni.kernels.promise import Promise, kept
from vllm_omni.nested import modules_in


@dataclass(frozen=True)
class DenoiserCall:
    """The arguments with which a pipeline called its denoiser, and the guidance branch it named."""

    denoiser: str
    branch: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class ComponentCall:
    """A call of a text encoder, or of the VAE's decoder: `method` of the pipeline's `component`."""

    component: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    output: Any


@dataclass(frozen=True)
class Failed:
    error: Exception


@dataclass(frozen=True)
class Awaited:
    """The pipeline needs the results that were promised to it."""


Event = DenoiserCall | ComponentCall | Awaited | Finished | Failed
_LOCK = type(threading.Lock())
TEXT_ENCODERS = COMPONENTS["text_encoder_device"]
# Of a pipeline's own machinery. What a signal's handler raises (KeyboardInterrupt, SystemExit) is the caller's.
_CONTROL_FLOW = (asyncio.CancelledError, GeneratorExit, GreenletExit)
CAUGHT = 8  # times that a pipeline may catch the error that ends it, and call again


class _Proxy:
    """Looks like the module to a pipeline."""

    _name: str
    _park: Callable[[Any], Any]
    _module: Any
    _elsewhere: Elsewhere | None
    _parks: bool

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        park: Callable[[Any], Any],
        elsewhere: Elsewhere | None = None,
        parks: bool = True,
    ) -> None:
        vars(self).update(_name=name, _park=park, _module=module, _elsewhere=elsewhere, _parks=parks)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pipelines ask isinstance(self.transformer, ...)
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        if self._elsewhere is not None:
            return self._elsewhere.attribute(self._module, name)
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._elsewhere is not None:
            self._elsewhere.quiet()
        setattr(self._module, name, value)


class DenoiserProxy(_Proxy):
    """Calling it parks the request until the engine brings the result."""

    _branch: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._park(DenoiserCall(self._name, self._branch, args, kwargs))

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """The pipeline's name of the guidance branch, kept per request."""
        vars(self)["_branch"] = name
        try:
            yield
        finally:
            vars(self)["_branch"] = None


class EncoderProxy(_Proxy):
    """A text encoder; calling it parks the request, unless its pipeline has hooked it for the time of the call."""

    _hooks: int | None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        vars(self)["_hooks"] = _hooks_on(self._module) if self._parks else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _hooks_on(self._module) != self._hooks:  # JoyImage's read the states there: they must be its own rows
            return _called(self._elsewhere, self._module, args, kwargs)
        return self._park(ComponentCall(self._name, "__call__", args, kwargs))


def _called(elsewhere: Elsewhere | None, act: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `act` returns, for which its request does not park."""
    return act(*args, **kwargs) if elsewhere is None else elsewhere.call(act, *args, **kwargs)


def _hooks_on(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in modules_in(module))


class DecoderProxy(_Proxy):
    """A VAE; `decode` parks the request, unless its pipeline has changed the VAE for the time of the call."""

    _own: _Types | None = None  # before the change

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """SDXL's pipelines decode in float32 and go back to float16: nobody else may run between."""
        if self._own is None:
            vars(self)["_own"] = _types_of(self._module)
        if self._elsewhere is None:
            self._module.to(*args, **kwargs)
        else:
            self._elsewhere.cast(self._module, *args, **kwargs)
        return self

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        if self._own is not None or not self._parks:
            return _called(self._elsewhere, self._module.decode, args, kwargs)
        return self._park(ComponentCall(self._name, "decode", args, kwargs))

    def put_back(self) -> AbstractContextManager[None]:
        """Within, the VAE is as it was before this request has changed it."""
        return nullcontext() if self._own is None else self._put_back(self._own)

    @contextmanager
    def _put_back(self, own: _Types) -> Iterator[None]:
        changed = _types_of(self._module)
        self._cast(own)
        try:
            yield
        finally:
            self._cast(changed)

    def leave(self) -> None:
        """Leave the VAE as it was: AuraFlow's pipeline does not go back by itself, nor does one that fails."""
        if self._own is not None:
            self._cast(self._own)

    def _cast(self, types: _Types) -> None:
        if self._elsewhere is not None:
            self._elsewhere.quiet()
        _cast(types)


_Types = list[tuple[dict[str, Any], str, torch.device, torch.dtype]]


def _types_of(module: torch.nn.Module) -> _Types:
    """Where every parameter and buffer is kept, and as what."""
    tensors = [(own, name) for m in module.modules() for own in (m._parameters, m._buffers) for name in own]
    return [(own, name, t.device, t.dtype) for own, name in tensors if (t := own[name]) is not None]


def _cast(types: _Types) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for own, name, device, dtype in types:
            if (tensor := own[name]).dtype != dtype or tensor.device != device:
                tensor.data = tensor.data.to(device, dtype)


class PipelineTask:
    """One run of `pipeline(**arguments)`: its own shallow copy, its own schedulers, shared weights."""

    def __init__(
        self,
        pipeline: Any,
        arguments: dict[str, Any],
        device: torch.device | None = None,
        components: bool = True,
        elsewhere: Mapping[str, Elsewhere] = MappingProxyType({}),
    ) -> None:
        """`device`: where the pipeline is known to run; it finds out for itself otherwise. `components`: whether it
        parks at text encoders and decoder, too. `elsewhere`: the components that are not on `device`.
        """
        self._vae: DecoderProxy | None = None
        self.pipeline: Any = copy.copy(pipeline)
        own = vars(self.pipeline)
        own |= own_schedulers(pipeline)
        own["_progress_bar_config"] = {"disable": True}
        own["maybe_free_model_hooks"] = lambda: None  # the model outlives the request
        own.pop("_num_timesteps", None)
        if device is not None:
            self.pipeline.__class__ = _on_device(type(pipeline), device)  # type: ignore[arg-type]
        own |= {name: copy.copy(v) for name, v in own.items() if isinstance(v, BaseGuidance)}  # notes step and branch
        own |= {name: copy.copy(v) for name, v in own.items() if type(v) in (list, dict, set)}  # what a run notes there
        own |= {name: threading.Lock() for name, v in own.items() if isinstance(v, _LOCK)}  # held while it is parked
        for name in DENOISER_NAMES:
            if isinstance(module := own.get(name), torch.nn.Module):
                own[name] = DenoiserProxy(name, module, self._park)
        encoders = {n: m for n in TEXT_ENCODERS if isinstance(m := own.get(n), torch.nn.Module)}
        # pipelines scale the adapters of all encoders around their calls
        parks = components and not any(map(has_adapters, encoders.values()))
        for name, module in encoders.items():
            if parks or name in elsewhere:
                own[name] = EncoderProxy(name, module, self._park, elsewhere.get(name), parks)
        if isinstance(module := own.get("vae"), torch.nn.Module):  # always: it leaves the VAE as it was
            own["vae"] = self._vae = DecoderProxy("vae", module, self._park, elsewhere.get("vae"), components)
        self.arguments, self.given = arguments, frozenset(arguments)
        self._greenlet: greenlet | None = None
        self._engine: greenlet | None = None
        self._promises: list[Promise] = []
        self._promised = False  # a promise was made, and may be in an argument

    def resume(self, result: Any = None) -> Event:
        """Run until the next call that parks, or the end. The first call starts it."""
        self._engine = greenlet.getcurrent()
        if self._greenlet is None:
            self._greenlet = greenlet(self._run)
            return self._greenlet.switch()
        return self._greenlet.switch(result)

    def throw(self, error: Exception) -> Event:
        """Raise `error` at the call where the request is parked, so that the pipeline unwinds."""
        self._engine = greenlet.getcurrent()
        if self._greenlet is None or self._greenlet.dead:
            return Failed(error)
        for _ in range(CAUGHT):
            event = self._greenlet.throw(type(error), error, error.__traceback__)
            if isinstance(event, Finished | Failed):
                return event
        self._greenlet.throw()  # as greenlets are ended: no `except Exception` catches it
        return Failed(error)

    def promise(self, form: Any) -> Promise:
        """A result to resume with before its call is made; `keep` it as soon as it is."""
        promise = Promise(form, self._wait)
        self._promises.append(promise)
        self._promised = True
        return promise

    def release(self) -> None:
        """Let go of the pipeline's copy, whose proxies hold this task."""
        self.pipeline = self._vae = None
        self._promises.clear()

    def _run(self) -> Event:
        try:
            with numpy.errstate(invalid="call", call=_no_number):  # of this greenlet alone
                output = self.pipeline(**self.arguments)
                self._wait()
                return Finished(output)
        except Exception as error:  # whatever a pipeline raises ends this request alone
            return Failed(error)
        except _CONTROL_FLOW as error:
            return Failed(RuntimeError(f"the model's pipeline raised {type(error).__name__}"))
        finally:
            if self._vae is not None:
                self._vae.leave()
            assert self._engine is not None and self._greenlet is not None
            self._greenlet.parent = self._engine

    def _park(self, call: DenoiserCall | ComponentCall) -> Any:
        if not isinstance(call, DenoiserCall):
            self._wait()
        if self._promised:
            args, kwargs = kept((call.args, call.kwargs))
            call = replace(call, args=args, kwargs=kwargs)
        return self._switch(call)

    def _wait(self) -> None:
        """Let the engine make the calls whose results are promised."""
        self._promises = [promise for promise in self._promises if not promise.kept]
        if self._promises and greenlet.getcurrent() is not self._greenlet:
            raise RuntimeError("a result that is promised to a pipeline was used outside of it")
        while self._promises:
            self._switch(Awaited())
            self._promises = [promise for promise in self._promises if not promise.kept]

    def _switch(self, event: Event) -> Any:
        assert self._engine is not None
        with nullcontext() if self._vae is None else self._vae.put_back():
            return self._engine.switch(event)


@functools.lru_cache(maxsize=32)
def _on_device(pipeline_class: type, device: torch.device) -> type:
    """The class with its execution device known: diffusers walks through all modules for it, in every request."""
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})


def device_of(pipeline: Any, apart: bool = False) -> torch.device | None:
    """Where the pipeline runs; a module of the user's own does not say where it is, its weights do.

    `apart`: other components may be on other devices, and none is offloaded.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        return None
    try:
        if not apart:
            return pipeline._execution_device
    except AttributeError:
        pass
    return next((p.device for module in denoisers_of(pipeline).values() for p in module.parameters()), None)


def _no_number(kind: str, flag: int) -> None:
    """numpy reports NaN on its way into a picture."""
    raise NumericalError
