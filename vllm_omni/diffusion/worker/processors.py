"""Attention processors that a pipeline puts on the shared denoiser for the time of its call, as PAG's pipelines do.

They are taken back at once, kept with the request, and installed around its own forwards alone: neighbours, and whoever
comes after a request that was aborted, find the denoiser as it was. Such a request shares no forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "processor"  # what diffusers' attention modules call it


class OwnProcessors:
    """The processors of one request, by module; none, for a pipeline that leaves the denoiser alone."""

    def __init__(self, changed: list[tuple[torch.nn.Module, Any]] | None = None) -> None:
        self._changed = changed or []

    def __bool__(self) -> bool:
        return bool(self._changed)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the modules have the request's processors."""
        own = [(module, vars(module)[_NAME]) for module, _ in self._changed]
        try:
            for module, processor in self._changed:
                vars(module)[_NAME] = processor
            yield
        finally:
            for module, processor in own:
                vars(module)[_NAME] = processor


class SharedProcessors:
    """The processors that the denoisers had when the engine was made."""

    def __init__(self, denoisers: Iterable[torch.nn.Module]) -> None:
        modules = [module for denoiser in denoisers for module in denoiser.modules() if _NAME in vars(module)]
        self._own = [(module, vars(module)[_NAME]) for module in modules]

    def taken_back(self) -> OwnProcessors:
        """What a pipeline has put in their place, taken off the denoisers again."""
        changed = [(module, vars(module)[_NAME]) for module, own in self._own if vars(module)[_NAME] is not own]
        for module, own in self._own:
            vars(module)[_NAME] = own
        return OwnProcessors(changed)
