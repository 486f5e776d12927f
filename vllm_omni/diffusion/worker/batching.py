"""Which parked calls may be made as one, joining them, and splitting the result. Knows no cache and no policy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from vllm_omni.diffusion.denoiser.discover import names_of
from vllm_omni.diffusion.denoiser.known import Denoiser
from vllm_omni.diffusion.denoiser.rows import equal, for_each, joined, latents_of, row_shape
from vllm_omni.diffusion.denoiser.specs import Text
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.padding import padded

WORTH_PADDING = 1.25  # the longest sequence of a forward over the shortest
# Of diffusers' attention kernels those that leave out whatever keys a mask says. Others refuse a mask, or take it to
# say how many keys there are, counted from the first.
MASKING = frozenset(("native", "_native_math", "_native_cudnn", "_native_efficient", "flash_varlen_hub"))


class CallBinder:
    """For one denoiser: positional arguments by name, and which calls may share a forward."""

    def __init__(self, name: str, denoiser: Denoiser) -> None:
        self.name, self.denoiser = name, denoiser
        self._names = names_of(denoiser.module)
        self.pads = leaves_out_keys(denoiser.module)  # shorter texts, with a mask
        self.multiple = 1  # of tokens, to which texts that can have a mask are padded

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name; InvalidValueError for one that has none."""
        if len(args) > len(self._names):
            fix = "is called with more arguments by place than it names; give them names, as diffusers' own have"
            raise InvalidValueError(self.name, f"{len(args)} arguments", fix)
        return dict(zip(self._names, args, strict=False)) | kwargs

    def key(self, arguments: Mapping[str, Any], alone: Hashable, memory: dict[Any, Any]) -> Hashable:
        """Equal keys fit together. A call of unknown roles, or an argument that cannot be compared, goes `alone`.

        `memory` is the request's own: a shared tensor is read once per request, not once per step.
        """
        spec = self.denoiser.roles_for(arguments)
        if spec is None:
            return self.name, alone
        latents = latents_of(arguments)
        rows, padded = len(latents), {text.name: text for text in spec.texts} if self.pads else {}
        masks = {text.mask for text in padded.values()}
        parts: list[Hashable] = [self.name, self.denoiser.kind_of(arguments)]
        try:
            for name, value in arguments.items():
                if name in masks:
                    continue  # of texts that are padded to each other's length
                of_rows, shared = name in spec.rows, name in spec.shared
                if name in padded:
                    parts.append((name, _text_shape(padded[name], value, latents)))
                elif of_rows:
                    parts.append((name, row_shape(for_each(value, rows), rows, int(name in spec.rows_in_dim_1))))
                if shared or not of_rows:
                    parts.append((name, equal(value, memory if shared else None)))
        except TypeError:
            return self.name, alone
        return tuple(parts)

    def join(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One call's arguments for many; a single call stays as it is, if its texts may."""
        first = dict(calls[0])
        if (spec := self.denoiser.roles_for(first)) is None:
            return first
        masked = [text for text in spec.texts if text.mask and first.get(text.name) is not None]
        if len(calls) == 1 and all(first[text.name].shape[1] % self.multiple == 0 for text in masked):
            return first
        texts: dict[str, list[Any]] = {}
        for text in masked:
            given = [call[text.name] for call in calls], [call.get(text.mask) for call in calls]
            texts[text.name], texts[text.mask] = padded(*given, self.multiple)
            first[text.mask] = texts[text.mask][0]
        rows = [len(latents_of(call)) for call in calls]
        return first | {
            name: joined(
                texts.get(name) or [for_each(call[name], n) for call, n in zip(calls, rows, strict=True)],
                int(name in spec.rows_in_dim_1),
            )
            for name in spec.rows
            if first.get(name) is not None
        }


def leaves_out_keys(module: torch.nn.Module) -> bool:
    """Whether the attention kernels of a denoiser leave out the keys that a mask says, wherever they are."""
    processors = [own["processor"] for part in module.modules() if "processor" in (own := vars(part))]
    chosen = {vars(processor).get("_attention_backend") for processor in processors} or {None}
    default = _AttentionBackendRegistry.get_active_backend()[0]
    return {kernel or default for kernel in chosen} <= MASKING


def _text_shape(text: Text, value: Any, latents: Any) -> Hashable:
    """What must agree of a text whose length may differ; TypeError if it is of another kind.

    Padding costs work: the sequences of a forward, image and text, differ by no more than a quarter.
    """
    if not text.mask and isinstance(value, list) and all(isinstance(entry, torch.Tensor) for entry in value):
        return tuple((-(-len(entry) // text.padded), entry.shape[1:], entry.dtype) for entry in value)
    alike = isinstance(value, torch.Tensor) and isinstance(latents, torch.Tensor) and len(value) == len(latents)
    if alike and value.ndim == 3:
        return int(math.log(1 + value.shape[1] / latents.shape[1], WORTH_PADDING)), value.shape[2], value.dtype
    if value is None:
        return None
    raise TypeError(type(value))
