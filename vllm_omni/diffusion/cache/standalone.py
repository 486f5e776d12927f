"""The cache on a plain diffusers pipeline, or on a bare denoiser, without the engine: one anonymous request."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import CacheMixin

from vllm_omni.diffusion.cache.forward import BatchRows, CachedForward, look
from vllm_omni.diffusion.cache.plan.schedule import Schedule
from vllm_omni.diffusion.cache.state import CacheState
from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.discover import names_of
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.lora_scales import scale_of_call, scales_of
from vllm_omni.diffusion.denoiser.rows import latents_of
from vllm_omni.diffusion.denoiser.specs import unwrapped
from vllm_omni.diffusion.denoiser.step_tracker import StepPosition, StepTracker, Tracker, itself
from vllm_omni.diffusion.hooks.base import HookRegistry, ModelHook
from vllm_omni.errors import InvalidValueError
from vllm_omni.nested import modules_in

HOOK_NAME = "mag_cache"


class Session:
    """Whoever calls the denoisers is one request; a new schedule is a new request, planned for its own steps."""

    def __init__(self, tracker: Tracker, make_state: Callable[[Schedule], CacheState]) -> None:
        self.tracker = tracker
        self.state: CacheState | None = None
        self._make_state = make_state
        self._run: int | None = None
        if isinstance(tracker, StepTracker):
            tracker.observe = self._observe

    def locate(self, denoiser: str, branch: str | None) -> tuple[CacheState, StepPosition]:
        """The state of the request that calls, and the position of its call."""
        position = self.tracker.locate(denoiser, branch)
        if self.state is None or position.run != self._run:
            self._forget()
            self._run = position.run
            self.state = self._make_state(self.tracker.schedule())
        return self.state, position

    def _observe(self, step: int, model_output: Any, sample: Any) -> None:
        if self.state is not None:
            self.state.observe(step, model_output, sample)

    def restart(self, steps: int | None = None) -> None:
        """Forget the request; where calls are counted, the next one is the first, of `steps` or as many as before."""
        self.tracker.restart(steps)
        self._forget()

    def _forget(self) -> None:
        if self.state is not None:
            self.state.drop()
        self.state = self._run = None


class StandaloneHook(ModelHook):
    """Opens the cache's scope around each forward of one denoiser."""

    def __init__(
        self,
        name: str,
        denoiser: Denoiser,
        stack_for: Callable[[str, Mapping[str, Any]], BlockStack | None],
        session: Session,
    ) -> None:
        self.name, self.denoiser, self.session = name, denoiser, session
        self.branch: str | None = None
        self._stack_for, self._names = stack_for, names_of(denoiser.module)
        self._forward: CachedForward | None = None
        self._scales: Hashable = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        inner = unwrapped(module)
        if isinstance(inner, CacheMixin):
            vars(inner)["cache_context"] = _BranchContext(self, inner.cache_context)
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._forward is not None:  # no hook runs after a forward that a KeyboardInterrupt ends
            self.session.restart()
        self._close()
        state, position = self.session.locate(self.name, self.branch)
        if position.step == 0:  # it may have come after ours
            refuse_foreign_caches(self.denoiser.module)
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        scales, self._scales = self._scales, (scales_of(self.denoiser.module), scale_of_call(arguments))
        if scales != self._scales:
            state.drop()  # with other adapters it is another model: what was kept is not its own
        self.denoiser.learn(arguments, lambda given: module.forward(**given))
        forecast, stack = None, self._stack_for(self.name, arguments)
        rows = len(latents_of(arguments)) if stack is not None else 0
        row = BatchRows(state, (self.name, position.branch), position.step, slice(0, rows), arguments)
        if stack is not None:
            state.follow(row.key, latents_of(arguments))
            if (signal := state.signal(row.key, row.step)) is not None:
                look([row], signal, stack, partial(module.forward, *args, **kwargs))
            forecast = state.forecast(row.key, row.step, rows)
        self._forward = CachedForward(stack, [row], [forecast]).open()
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        forward, whole = self._forward, False
        try:
            if output is not None and forward is not None:
                (made,) = forward.results(output)
                forward.commit(output)
                output = made
            whole = output is not None
        finally:
            if not whole:  # the forward raised, or what it returned cannot be kept: the request is over
                self.session.restart()
            self._close()
        return output

    def _close(self) -> None:
        self.denoiser.leave()
        self._forward = None

    def reset_state(self, module: torch.nn.Module) -> None:
        self.session.restart()


class _BranchContext:
    """A denoiser's `cache_context`, with the branch it names noted."""

    def __init__(self, hook: StandaloneHook, own: Callable[..., Any]) -> None:
        self.hook, self.own = hook, own

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        with self.own(name, **kwargs):
            self.hook.branch = name
            try:
                yield
            finally:
                self.hook.branch = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle of the denoiser has its own context alone."""
        return itself, (self.own,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _BranchContext:
        return _BranchContext(copy.deepcopy(self.hook, memo), copy.deepcopy(self.own, memo))


def attach(module: torch.nn.Module, hook: StandaloneHook) -> None:
    """Put `hook` on `module`; `detach` takes it off again."""
    HookRegistry.get_or_create(module).register_hook(HOOK_NAME, hook)


def detach(module: torch.nn.Module) -> None:
    """Leave the module as it was before `attach`."""
    HookRegistry.get_or_create(module).remove_hook(HOOK_NAME)
    context = vars(unwrapped(module)).pop("cache_context", None)
    if isinstance(context, _BranchContext) and not inspect.ismethod(context.own):  # somebody's, on this very instance
        vars(unwrapped(module))["cache_context"] = context.own


def refuse_other_caches(module: torch.nn.Module) -> None:
    """InvalidValueError if a cache is on the denoiser already: two would each take the other's forecasts for blocks."""
    name, inner = type(unwrapped(module)).__name__, unwrapped(module)
    hooked = any(HookRegistry.hook_of(one, HOOK_NAME) is not None for one in (module, inner))
    if hooked or isinstance(vars(inner).get("cache_context"), _BranchContext):  # through another wrapper
        how = "has a cache of ours; call its backend's disable(pipeline) first, or detach(denoiser) after apply_…_hook"
        raise InvalidValueError(name, "cached", how)
    refuse_foreign_caches(inner)


def refuse_foreign_caches(inner: torch.nn.Module) -> None:
    """InvalidValueError if somebody else's cache is on the denoiser."""
    name = type(inner).__name__
    if isinstance(inner, CacheMixin) and inner.is_cache_enabled:
        raise InvalidValueError(name, "cached", "has diffusers' own cache enabled; call its disable_cache() first")
    if vars(inner).get("_is_cached"):  # cache-dit's mark
        raise InvalidValueError(name, "cached", "has cache-dit enabled; call cache_dit.disable_cache(pipeline) first")
    if (hook := _stateful_hook(inner)) is not None:
        how = f"has diffusers' hook {hook!r}, which keeps state between steps; load the denoiser without it, or remove "
        how += "it: HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(its name, recurse=True)"
        raise InvalidValueError(name, "cached", how)
    owners = (inner, *type(inner).__mro__)
    if counts := sorted(name for name in _COUNTS if any(name in vars(owner) for owner in owners)):
        how = f"counts its own steps ({', '.join(counts)}), as published TeaCache and MagCache scripts make it; "
        raise InvalidValueError(name, "cached", how + "load it in a process that runs no such script")


# What such scripts set on a denoiser or on its class, beside a forward of their own.
_COUNTS = {"cnt", "enable_teacache", "accumulated_rel_l1_distance", "previous_modulated_input", "residual_cache"}


def _stateful_hook(module: torch.nn.Module) -> str | None:
    """The name of a hook of diffusers' that keeps state, as every cache does that its `apply_…` functions put on."""
    registries = [vars(part).get("_diffusers_hook") for part in modules_in(module)]
    hooks = [pair for registry in registries if registry is not None for pair in registry.hooks.items()]
    return next((name for name, hook in hooks if type(hook)._is_stateful), None)
