"""Hooks on a module's forward. Knows nothing of caches; holds no request's state.

Hooks that only look before or after use torch's own hook lists, so they survive whatever else replaces `forward`
(CPU offload does). Only a hook that overrides `new_forward` replaces `forward`, and removing it puts back the original.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class ModelHook:
    """Override what you need; `self.original_forward` is the module's own forward while the hook is registered."""

    original_forward: Callable[..., Any]

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called once on registration."""
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called before each forward; returns its arguments."""
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Called after each forward; returns its output. `output` is None when the forward raised."""
        return output

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward, if overridden."""
        return self.original_forward(*args, **kwargs)

    def reset_state(self, module: torch.nn.Module) -> None:
        """Forget everything."""

    @property
    def overrides_forward(self) -> bool:
        return type(self).new_forward is not ModelHook.new_forward


class HookRegistry:
    """The hooks of one module, by name; pre hooks run in order of registration, post hooks in reverse."""

    _ATTRIBUTE = "_vllm_omni_hooks"

    def __init__(self, module: torch.nn.Module | None) -> None:
        self.module: Any = module
        self.hooks: dict[str, ModelHook] = {}
        self._handles: list[Any] = []

    @classmethod
    def hook_of(cls, module: torch.nn.Module, name: str) -> ModelHook | None:
        """The hook of that name, without making a registry."""
        registry = vars(module).get(cls._ATTRIBUTE)
        return registry.get_hook(name) if registry is not None else None

    @classmethod
    def get_or_create(cls, module: torch.nn.Module) -> HookRegistry:
        registry = vars(module).get(cls._ATTRIBUTE)
        if registry is None or registry.module is not module:  # a module from a pickle has one of nobody's
            registry = cls(module)
            vars(module)[cls._ATTRIBUTE] = registry
        return registry

    def register_hook(self, name: str, hook: ModelHook) -> None:
        """Add `hook`; ValueError if the name is taken, RuntimeError if a second hook overrides the forward."""
        if name in self.hooks:
            raise ValueError(f"a hook named {name!r} is registered already; remove it first")
        if hook.overrides_forward and any(h.overrides_forward for h in self.hooks.values()):
            raise RuntimeError(f"{name!r} overrides forward, and so does a hook that is registered already")
        if not self.hooks:
            module = self.module
            self._handles = [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True, prepend=True),
            ]
        self.hooks[name] = hook
        hook.original_forward = self.module.forward
        hook.initialize_hook(self.module)
        if hook.overrides_forward:
            module = self.module

            def forward(*args: Any, **kwargs: Any) -> Any:
                return hook.new_forward(module, *args, **kwargs)

            vars(module)["forward"] = forward

    def remove_hook(self, name: str) -> None:
        """Remove a hook; the last one restores the module as it was. Unknown names are ignored."""
        hook = self.hooks.pop(name, None)
        if hook is not None and hook.overrides_forward:
            vars(self.module).pop("forward", None)
            if self.module.forward != hook.original_forward:
                vars(self.module)["forward"] = hook.original_forward
        if not self.hooks:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            vars(self.module).pop(self._ATTRIBUTE, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookRegistry:
        """A module's copy has hooks of its own, with copies of what they hold."""
        memo[id(self)] = twin = object.__new__(HookRegistry)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle of the module is without hooks: they belong to this process."""
        return HookRegistry, (None,)

    def get_hook(self, name: str) -> ModelHook | None:
        return self.hooks.get(name)

    def reset_hook(self, name: str) -> None:
        if name in self.hooks:
            self.hooks[name].reset_state(self.module)

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for hook in self.hooks.values():
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for hook in reversed(self.hooks.values()):
            output = hook.post_forward(module, output)
        return output


class StateManager:
    """One lazily made state per named context ("cond", "uncond", ...); no name is the context "default"."""

    def __init__(
        self, state_cls: type, init_args: tuple[Any, ...] = (), init_kwargs: dict[str, Any] | None = None
    ) -> None:
        self._states = defaultdict[str, Any](partial(state_cls, *init_args, **(init_kwargs or {})))
        self._current = "default"

    def set_context(self, name: str | None) -> None:
        self._current = name or "default"

    def get_state(self) -> Any:
        return self._states[self._current]

    def reset(self) -> None:
        self._states.clear()
        self._current = "default"
