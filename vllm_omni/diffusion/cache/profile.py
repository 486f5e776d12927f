"""Calibrated facts about a checkpoint: its magnitude curve and its residuals' Gram matrix, with their provenance.

A profile belongs to a checkpoint (a hub id, or a fingerprint of its weights), never to a class of models.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from vllm_omni.diffusion.data import PredictorName, as_curve
from vllm_omni.diffusion.settings import Settings
from vllm_omni.errors import InvalidValueError

PROFILE_DIR = Path(__file__).parent / "profiles"
MAX_PROFILE_BYTES = 64 * 2**20


class CacheProfile(Settings):
    """`ratios` is gamma per step (1 first); `gram[s][t]` the mean of <r_s, r_t> over tokens, prompts and branches.

    `predictor` is the one that was nearest to the uncached latents when the profile was made.
    """

    name: str = Field(min_length=1)
    transformer_class: str
    models: tuple[str, ...] = ()
    fingerprint: str | None = None
    ratios: tuple[float, ...]
    sigmas: tuple[float, ...] | None = None
    gram: tuple[tuple[float, ...], ...] | None = None
    predictor: PredictorName | None = None
    branches: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("ratios", mode="before")
    @classmethod
    def _curve(cls, value: Any) -> Any:
        return as_curve("ratios", value)

    @model_validator(mode="after")
    def _shapes(self) -> CacheProfile:
        steps = len(self.ratios)
        if self.sigmas is not None and len(self.sigmas) != steps:
            raise InvalidValueError("sigmas", len(self.sigmas), f"must have one value per step, {steps}")
        if self.gram is not None:
            matrix = np.asarray(self.gram, dtype=np.float64) if len({len(r) for r in self.gram}) == 1 else np.empty(0)
            if matrix.shape != (steps, steps) or not np.isfinite(matrix).all() or self.sigmas is None:
                raise InvalidValueError("gram", matrix.shape, f"must be a finite {steps} x {steps} matrix, with sigmas")
            if not np.allclose(matrix, matrix.T, rtol=1e-3) or np.linalg.eigvalsh(matrix)[0] < -1e-3 * matrix.trace():
                raise InvalidValueError("gram", matrix.shape, "must be symmetric and positive semi-definite")
        return self

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint, self.ratios))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")


def load_profile(path: Path) -> CacheProfile:
    """Read a profile file; `InvalidValueError` naming the file and what is wrong with it."""
    if not path.is_file():
        raise InvalidValueError("profile", str(path), f"must be a profile file or one of {', '.join(profile_names())}")
    if path.stat().st_size > MAX_PROFILE_BYTES:
        raise InvalidValueError("profile", str(path), f"must be smaller than {MAX_PROFILE_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidValueError("profile", str(path), f"must hold a complete JSON profile ({error})") from None
    try:
        return CacheProfile.from_dict(content)
    except InvalidValueError as error:
        raise InvalidValueError("profile", str(path), f"must hold a valid profile ({error})") from None


def profile_names() -> list[str]:
    return sorted(file.stem for file in PROFILE_DIR.glob("*.json"))


@cache
def shipped_profile(name: str) -> CacheProfile:
    """A profile that comes with the package."""
    return load_profile(PROFILE_DIR / f"{name}.json")


def named_profile(name: str) -> CacheProfile:
    """A shipped profile by name, or a file by path."""
    if name in profile_names():
        return shipped_profile(name)
    path = Path(name)
    return _loaded(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=32)
def _loaded(path: Path, changed: int) -> CacheProfile:
    return load_profile(path)


def find_profile(model_name: str, fingerprint: str) -> CacheProfile | None:
    """The shipped profile of this very checkpoint: by fingerprint of the weights, or by hub id."""
    profiles = [shipped_profile(name) for name in profile_names()]
    for profile in profiles:
        if profile.fingerprint == fingerprint:
            return profile
    return next((profile for profile in profiles if model_name in profile.models), None)


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of the weights' names, shapes and a few values of each, read in bfloat16 so that dtype does not matter.

    LoRA adapters beside the weights do not count: a request may run without them.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters(), key=lambda pair: pair[0].replace('.base_layer', '')):
        if ".lora_" in name:
            continue
        digest.update(f"{name.replace('.base_layer', '')}{tuple(weight.shape)}".encode())
        if type(weight.data) is torch.Tensor:  # a quantised weight's class may not let single values be read
            few = weight.detach().flatten()[:4].to(device="cpu", dtype=torch.bfloat16).float()
            digest.update(few.numpy().tobytes())
    return digest.hexdigest()[:32]
