"""Per denoiser class: where the block stack is, and a curve to pass on purpose. Never chosen by class name alone."""

from __future__ import annotations

from typing import ClassVar

from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.diffusion.data import as_curve
from vllm_omni.diffusion.denoisers import DENOISERS, DenoiserSpec
from vllm_omni.errors import InvalidValueError


class MagCacheStrategy:
    """Subclass with `spec`, and `mag_ratios` where you have a curve for the checkpoints you serve."""

    spec: ClassVar[DenoiserSpec]
    mag_ratios: ClassVar[tuple[float, ...] | None] = None


class FluxMagCacheStrategy(MagCacheStrategy):
    """FLUX.1; the curve is the official one of FLUX.1-dev at 28 steps."""

    spec = DENOISERS["FluxTransformer2DModel"]
    FLUX_MAG_RATIOS: ClassVar[tuple[float, ...]] = shipped_profile("flux1-dev-28").ratios
    mag_ratios = FLUX_MAG_RATIOS


class Flux2MagCacheStrategy(MagCacheStrategy):
    """FLUX.2; no curve of known good measurement is published: calibrate."""

    spec = DENOISERS["Flux2Transformer2DModel"]


def _described(spec: DenoiserSpec) -> MagCacheStrategy:
    strategy = MagCacheStrategy()
    vars(strategy)["spec"] = spec
    return strategy


class MagCacheStrategyRegistry:
    """Strategies by transformer class name."""

    _strategies: ClassVar[dict[str, MagCacheStrategy]] = {}
    _own: ClassVar[set[str]] = set()  # registered by the user, whose curve is meant for whatever they load

    @classmethod
    def register(cls, name: str, strategy: MagCacheStrategy) -> None:
        cls._strategies[name] = strategy
        cls._own.add(name)

    @classmethod
    def get(cls, name: str) -> MagCacheStrategy:
        if name not in cls._strategies:
            raise InvalidValueError("transformer class", name, f"must be one of {', '.join(sorted(cls._strategies))}")
        return cls._strategies[name]

    @classmethod
    def get_if_exists(cls, name: str) -> MagCacheStrategy | None:
        """The registered strategy, else a plain one of what `denoisers.py` describes: the curve is the user's."""
        if name in cls._strategies or name not in DENOISERS:
            return cls._strategies.get(name)
        return _described(DENOISERS[name])

    @classmethod
    def users_curve(cls, name: str) -> tuple[float, ...] | None:
        return as_curve("mag_ratios", cls._strategies[name].mag_ratios) if name in cls._own else None


MagCacheStrategyRegistry._strategies.update(
    FluxTransformer2DModel=FluxMagCacheStrategy(), Flux2Transformer2DModel=Flux2MagCacheStrategy()
)


def register_strategy(name: str, strategy: MagCacheStrategy) -> None:
    """Make `strategy` the one for transformers of class `name`."""
    MagCacheStrategyRegistry.register(name, strategy)


def get_strategy(name: str) -> MagCacheStrategy:
    """The strategy of a transformer class; InvalidValueError lists the known ones."""
    return MagCacheStrategyRegistry.get(name)
