"""A modular pipeline of diffusers, made of blocks, as a whole pipeline: a call with named arguments, media as a result.

Knows no engine.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

_MEDIA = {"images": "images", "videos": "frames", "audio": "audio", "audios": "audios"}  # the blocks' name, and ours


def whole(pipeline: Any) -> Any:
    """The pipeline; a modular one as a copy, on the same components, that can be called like any other."""
    from diffusers.modular_pipelines import ModularPipeline

    if not isinstance(pipeline, ModularPipeline):
        return pipeline
    inputs = {parameter.name: parameter.default for parameter in pipeline.blocks.inputs if parameter.name}
    kind: Any = type(pipeline)
    made = copy.copy(pipeline)
    made.__class__ = _whole_class(kind, tuple(inputs), _Defaults(inputs.values()))
    return made


class _Defaults(tuple[Any, ...]):
    """Values that need not be hashable."""

    def __hash__(self) -> int:
        return hash(repr(tuple(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Defaults) and repr(tuple(self)) == repr(tuple(other))


@functools.lru_cache(maxsize=32)
def _whole_class(kind: type, names: tuple[str, ...], defaults: _Defaults) -> Any:
    def call(self: Any, **given: Any) -> dict[str, Any]:
        latent = given.get("output_type") == "latent"
        if latent or "output_type" not in names:
            given.pop("output_type", None)
        made = kind.__call__(self, **given)  # all that its blocks have written
        if latent:
            return {"latents": made.get("latents")}
        return {ours: made.get(name) for name, ours in _MEDIA.items() if made.get(name) is not None}

    named = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for name, default in zip(names, defaults, strict=True):
        named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    call.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
