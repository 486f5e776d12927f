"""The cache on a plain pipeline for the length of a block, and what its denoiser's blocks then really do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pipelines import CURVE, negative

from vllm_omni.diffusion.cache.magcache import (
    MagCacheBackend,
)
from vllm_omni.diffusion.data import DiffusionCacheConfig

RESIDUAL_BYTES = 64 * 32 * 4  # 32 x 32 pixels are 64 tokens of width 32, in float32
CFG = {"true_cfg_scale": 3.0, **negative(0)}


@contextmanager
def cached(pipeline: Any, **settings: Any) -> Iterator[MagCacheBackend]:
    if not {"profile", "mag_calibrate", "mag_ratios"} & settings.keys():
        settings["mag_ratios"] = CURVE
    backend = MagCacheBackend(DiffusionCacheConfig(**settings))
    backend.enable(pipeline)
    try:
        yield backend
    finally:
        backend.disable(pipeline)


def sigmas_of(pipeline: Any) -> tuple[float, ...]:
    return tuple(pipeline.scheduler.sigmas.tolist()[:-1])


class Probe:
    """Per transformer call: whether the blocks ran, and what the stack (or its stand-in) added to the image tokens."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.before: list[torch.Tensor] = []
        self.added: list[torch.Tensor] = []
        self.ran: list[bool] = []
        self._ran = False
        self._handles = [
            transformer.x_embedder.register_forward_hook(self._embedded),
            transformer.transformer_blocks[0].register_forward_pre_hook(self._block),
            transformer.norm_out.register_forward_pre_hook(self._head),
        ]

    def _embedded(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.before.append(output.detach().clone())
        self._ran = False

    def _block(self, module: Any, args: Any) -> None:
        self._ran = True

    def _head(self, module: Any, args: Any) -> None:
        self.added.append(args[0].detach() - self.before[-1])
        self.ran.append(self._ran)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def probed(pipeline: Any) -> Iterator[Probe]:
    probe = Probe(pipeline.transformer)
    try:
        yield probe
    finally:
        probe.remove()
