"""Every family, described by hand or not, and the transformer classes of the installed diffusers that none covers.

A new release of diffusers shows up by itself: its classes are read from the package.
"""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import diffusers
import diffusers.models.transformers as transformers
from families import FAMILIES
from family import Family
from zoo_images import IMAGES
from zoo_prompts import PROMPTS
from zoo_sound import SOUNDS
from zoo_videos import VIDEOS

ZOO = [*IMAGES, *PROMPTS, *VIDEOS, *SOUNDS]

# Classes of the package that no family has as a denoiser, and why; `test_every_class_is_covered_or_named` checks it.
_MODULAR = "has a modular pipeline alone: the engine takes those, but a tiny one of this model has not been made"
NOT_COVERED = {
    "MiniMaxH3Transformer3DModel": _MODULAR,
    "MiniMaxMusic3Transformer1DModel": _MODULAR,
    "WanAnimate2Transformer3DModel": _MODULAR,
    "DreamLiteTransformer2DModel": "a part of the U-Net of DreamLite, not a denoiser of its own",
    "DualTransformer2DModel": "a part of the U-Net of Versatile Diffusion, whose pipelines are deprecated",
    "Transformer2DModel": "a part of U-Nets, and the denoiser of VQ Diffusion, whose pipeline is deprecated",
    "TransformerTemporalModel": "a part of video U-Nets, not a denoiser of its own",
    "T5FilmDecoder": "the decoder of Spectrogram Diffusion, whose pipeline is deprecated and needs note-seq",
    "SanaWMLTX2RefinerTransformer3DModel": "a second stage for Sana's world model, in no pipeline",
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder of codes, not a denoiser",
    "RFD4ProteinaTransformer": "designs proteins: its pipeline has two schedulers and returns atoms",
    "PriorTransformer": "makes one image embedding for another model: its pipeline's `prior` is no picture's denoiser",
}


def transformer_classes() -> list[str]:
    """The transformer classes of the installed diffusers, by name."""
    found = vars(transformers)
    return sorted(name for name in dir(transformers) if inspect.isclass(found.get(name, getattr(transformers, name))))


@functools.cache
def pipelines_of() -> dict[str, list[str]]:
    """The pipelines, modular ones too, that have each transformer class as a component, read from their source."""
    names, found = set(transformer_classes()), {}
    root = Path(inspect.getfile(diffusers)).parent
    for path in [*root.glob("pipelines/**/pipeline_*.py"), *root.glob("modular_pipelines/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & names
        makers = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline")]
        for name in used:
            found.setdefault(name, []).extend(makers)
    return {name: sorted(set(found.get(name, []))) for name in sorted(names)}


@functools.cache
def covered() -> dict[str, list[Family]]:
    """The families of each transformer class."""
    found: dict[str, list[Family]] = {}
    for family in [*FAMILIES, *ZOO]:
        found.setdefault(type(family.build().transformer).__name__, []).append(family)
    return found
