"""What a pipeline changes on shared modules for the time of its call: attention processors of its denoiser, as PAG's
pipelines do, settings on the denoiser itself, as SkyReels' do, plain settings of another part, as LTX's long videos
switch on the VAE's tiling, hooks, as guiders put on blocks, or what `torch.autocast` computes in.

Such changes are there while the pipeline's own code runs and in its own forwards, and nowhere else: neighbours, and
whoever comes after a request that was aborted, find the modules as they were. Such a request shares no forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.specs import unwrapped
from vllm_omni.kernels.device import Autocast
from vllm_omni.nested import modules_in

_PROCESSOR = "processor"  # what diffusers' attention modules call it
_HOOKED = ("forward", "_diffusers_hook")  # what a hook of diffusers' sets on its module
_TORCHS_OWN = frozenset(vars(torch.nn.Module()))
_PLAIN = (bool, int, float, str, type(None))  # of a setting; lists and tensors are what a part works with (Wan's VAE)
_ABSENT, _NO_SETTING = object(), object()

_Entry = tuple[Any, str, Any]  # a module's attributes, a name, and what it is to be


class OwnChanges:
    """What one request's pipeline has changed; nothing, for a pipeline that leaves the denoiser alone."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []

    def __bool__(self) -> bool:
        return bool(self.entries)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the modules are as the request's pipeline wants them."""
        own = [(attributes, name, attributes.get(name, _ABSENT)) for attributes, name, _ in self.entries]
        try:
            _put(self.entries)
            yield
        finally:
            _put(own)


NOTHING_CHANGED = OwnChanges()  # of many requests: no pipeline runs with it


class SharedModules:
    """The denoisers of a pipeline and its other parts, as they are between the turns of its requests."""

    def __init__(
        self,
        denoisers: Callable[[], Iterable[torch.nn.Module]],
        others: Callable[[], Iterable[torch.nn.Module]] = tuple,
        hooked: bool = True,
    ) -> None:
        """`hooked`: the pipeline may put hooks or other children on any module, which takes some time to look for."""
        self._denoisers, self._others, self._hooked = denoisers, others, hooked
        self.scan()

    def scan(self) -> None:
        """Look for the modules that can be changed: blocks may have been replaced since the last time."""
        denoisers = [unwrapped(denoiser) for denoiser in self._denoisers()]
        modules = [module for denoiser in denoisers for module in modules_in(denoiser)]
        self._views: list[tuple[Any, Callable[[Any], dict[str, Any]]]] = [(Autocast(), dict)]
        self._views += [(vars(part), _settings) for part in self._others()] + [(vars(one), _own) for one in denoisers]
        self._slots: list[tuple[Any, str]] = [(vars(one), _PROCESSOR) for one in modules if _PROCESSOR in vars(one)]
        self._hooks: list[dict[Any, Any]] = []
        for module in modules if self._hooked else denoisers:
            registry = None if module in denoisers else vars(module).get("_diffusers_hook")
            if registry is not None and not registry.hooks:  # an empty one is none, and each request makes its own
                del module._diffusers_hook
            self._slots += [(vars(module), name) for name in _HOOKED] + [(module._modules, n) for n in module._modules]
            self._hooks += [module._forward_pre_hooks, module._forward_hooks]

    @contextmanager
    def lent_to(self, changes: OwnChanges) -> Iterator[None]:
        """Within, a request's pipeline runs: it finds what it has changed, and may change more."""
        kept = [(attributes, view, [*attributes], [*attributes.values()]) for attributes, view in self._views]
        slots = [a.get(name, _ABSENT) for a, name in self._slots]
        hooks = [dict(own) if own else {} for own in self._hooks]  # there are thousands, nearly all empty
        try:
            _put(changes.entries)
            yield
        finally:
            both = zip(self._slots, slots, strict=True)
            changed = [(a, name, was) for (a, name), was in both if a.get(name, _ABSENT) is not was]
            changes.entries = [(a, name, a.get(name, _ABSENT)) for a, name, _ in changed]
            _put(changed)
            seen = [
                (attributes, view, view(dict(zip(names, values, strict=True))))
                for attributes, view, names, values in kept  # compared as a whole first: nearly always the same
                if [*attributes] != names or not all(map(is_, attributes.values(), values))
            ]
            seen += [(own, dict, before) for own, before in zip(self._hooks, hooks, strict=True) if own or before]
            for attributes, view, before in seen:
                now = view(attributes)
                names = [n for n in {**before, **now} if _differ(now.get(n, _ABSENT), before.get(n, _ABSENT))]
                changes.entries += [(attributes, name, now.get(name, _ABSENT)) for name in names]
                _put([(attributes, name, before.get(name, _ABSENT)) for name in names])


def _own(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _TORCHS_OWN}


def _settings(attributes: dict[str, Any]) -> dict[str, Any]:
    """The plain, public ones: what a part keeps for itself, such as that its hooks are installed, is no setting."""
    public = {name: value for name, value in attributes.items() if not name.startswith("_")}
    return {name: value if isinstance(value, _PLAIN) else _NO_SETTING for name, value in public.items()}


def _differ(one: Any, other: Any) -> bool:
    if one is other or one is _NO_SETTING or other is _NO_SETTING:
        return False
    return not (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)


def _put(entries: Iterable[_Entry]) -> None:
    for attributes, name, value in entries:
        if value is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = value
