"""Per denoiser class: a block stack, and a curve to pass on purpose. Never chosen by class name alone."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.diffusion.cache.settings import as_curve
from vllm_omni.diffusion.denoiser.specs import DENOISERS, DenoiserSpec, unwrapped
from vllm_omni.errors import InvalidValueError


class MagCacheStrategy:
    """Subclass with `mag_ratios`, a curve for the checkpoints you serve, and with `spec` if the class is not known."""

    spec: ClassVar[DenoiserSpec | None] = None
    mag_ratios: ClassVar[tuple[float, ...] | None] = None


class FluxMagCacheStrategy(MagCacheStrategy):
    """FLUX.1; the curve is the official one of FLUX.1-dev at 28 steps."""

    spec = DENOISERS["FluxTransformer2DModel"]
    FLUX_MAG_RATIOS: ClassVar[tuple[float, ...]] = shipped_profile("flux1-dev-28").ratios
    mag_ratios = FLUX_MAG_RATIOS


class Flux2MagCacheStrategy(MagCacheStrategy):
    """FLUX.2; no curve of known good measurement is published: calibrate."""

    spec = DENOISERS["Flux2Transformer2DModel"]


class MagCacheStrategyRegistry:
    """Strategies by transformer class name."""

    _strategies: ClassVar[dict[str, MagCacheStrategy]] = {
        "FluxTransformer2DModel": FluxMagCacheStrategy(),
        "Flux2Transformer2DModel": Flux2MagCacheStrategy(),
    }
    _own: ClassVar[set[str]] = set()  # registered by the user, whose curve is meant for whatever they load

    @classmethod
    def register(cls, name: str, strategy: MagCacheStrategy) -> None:
        """Make `strategy` the one for transformers of class `name`."""
        cls._strategies[name] = strategy
        cls._own.add(name)

    @classmethod
    def get(cls, name: str) -> MagCacheStrategy:
        """The strategy of a transformer class; InvalidValueError lists the known ones."""
        if name not in cls._strategies:
            raise InvalidValueError("transformer class", name, f"must be one of {', '.join(sorted(cls._strategies))}")
        return cls._strategies[name]

    @classmethod
    def get_if_exists(cls, name: str) -> MagCacheStrategy | None:
        """The strategy of a transformer class, if one is registered."""
        return cls._strategies.get(name)

    @classmethod
    def users_curve(cls, module: Any) -> tuple[float, ...] | None:
        """The curve that the user has registered for the class of `module`, or for one it derives from."""
        names = [c.__name__ for c in type(unwrapped(module)).__mro__ if c.__name__ in cls._own]
        return as_curve("mag_ratios", cls._strategies[names[0]].mag_ratios) if names else None

    @classmethod
    def spec_of(cls, module: Any) -> DenoiserSpec | None:
        """The block stack that a registered strategy names for the class of `module`, or for one it derives from."""
        found = (cls._strategies.get(c.__name__) for c in type(unwrapped(module)).__mro__)
        return next((strategy.spec for strategy in found if strategy is not None and strategy.spec is not None), None)


register_strategy = MagCacheStrategyRegistry.register
get_strategy = MagCacheStrategyRegistry.get
