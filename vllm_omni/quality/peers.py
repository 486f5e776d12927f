"""Other packages' caches on a plain diffusers pipeline: what to call to have each, and how strong to set it.

A peer has one knob that trades quality for speed and is scanned (`strengths`, mild to strong); its other settings are
the ones its own documentation gives, loosened where they would bar the larger speed-ups. `joint` peers decide by step
alone, so several pictures may share a call; the others look at data, mean over the batch, and get them one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.cache.profile import find_profiles, fingerprint
from vllm_omni.learning import nearest

Enable = Callable[[Any, int, float], None]  # pipeline, steps, strength
SEPARATE = "separate_branches"  # of a private pipeline: whether it makes a call for each branch of guidance


@dataclass(frozen=True)
class Peer:
    """`enable(pipeline, steps, strength)` puts the cache on a pipeline, for good: give it a `private` one."""

    name: str
    enable: Enable
    strengths: tuple[float, ...]
    joint: bool = False
    package: str = "diffusers"

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None

    def on(self, pipeline: Any, steps: int, strength: float, arguments: Mapping[str, Any]) -> Any:
        """A private copy of `pipeline` with this cache, for calls with these arguments."""
        own = private(pipeline)
        vars(own)[SEPARATE] = (arguments.get("true_cfg_scale") or 1) > 1
        self.enable(own, steps, strength)
        return own


def private(pipeline: Any) -> Any:
    """A pipeline with the same weights but modules and a class of its own.

    cache-dit replaces the class's `__call__` and the transformer's `forward`, and takes back only the first.
    """
    own = copy.copy(pipeline)
    own.__class__ = type(type(pipeline).__name__, (type(pipeline),), {"__module__": type(pipeline).__module__})
    transformer = pipeline.transformer
    weights = [*transformer.parameters(), *transformer.buffers()]
    vars(own)["transformer"] = copy.deepcopy(transformer, {id(weight): weight for weight in weights})
    vars(own)["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return own


def _magcache(pipeline: Any, steps: int, strength: float) -> None:
    from diffusers import MagCacheConfig

    known = find_profiles(str(pipeline.config.get("_name_or_path", "")), fingerprint(pipeline.transformer))
    profile = nearest(known, steps)
    assert profile is not None  # our own rows ask for it before any peer runs
    longest = steps  # the paper's cap of 3 to 5 bars 4x on some curves; the threshold bounds a run all the same
    config = MagCacheConfig(strength, longest, 0.1, num_inference_steps=steps, mag_ratios=list(profile.ratios))
    pipeline.transformer.enable_cache(config)


def _first_block(pipeline: Any, steps: int, strength: float) -> None:
    from diffusers import FirstBlockCacheConfig

    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=strength))


def _taylorseer(pipeline: Any, steps: int, strength: float) -> None:
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=int(strength),
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,  # the other mode caches attention alone: below 1.5x however it is set
    )
    pipeline.transformer.enable_cache(config)


def _seacache(pipeline: Any, steps: int, strength: float) -> None:
    """A pipeline that does not tell the hook step, sigma and latents: its own scheduler and arguments do."""
    from diffusers import SeaCacheConfig

    transformer = pipeline.transformer
    config = SeaCacheConfig(
        threshold=strength,
        max_consecutive_cached=0,  # no cap: the default, 2, bars more than 3x
        power_exp=3.0 if hasattr(pipeline, "video_processor") else 2.0,  # the paper's for video, and for pictures
        raw_vision_callback=_latents,
    )
    transformer.enable_cache(config)
    own = transformer.cache_context

    def told(name: str, **given: Any) -> AbstractContextManager[None]:
        scheduler = pipeline.scheduler
        step = scheduler.step_index or 0
        return own(name, **{"step_index": step, "sigma": scheduler.sigmas[step], "num_inference_steps": steps} | given)

    vars(transformer)["cache_context"] = told


def _latents(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Latents as one (channels, frames, height, width) per row; FLUX packs its own (rows, tokens, channels)."""
    latents = kwargs["hidden_states"]
    if latents.ndim == 3:
        width = int(kwargs["img_ids"][:, 2].max()) + 1
        return [row.T.unflatten(1, (1, -1, width)) for row in latents]
    return [row.unsqueeze(1) if row.ndim == 3 else row for row in latents]


def _dbcache(pipeline: Any, steps: int, strength: float, taylor: bool) -> None:
    """Two first steps in full and no cap on a run: of 2 to 6 and 2, 3, 5 or none, the best on the demo at 2x to 4x."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=strength,
        num_inference_steps=steps,
        enable_separate_cfg=vars(pipeline).get(SEPARATE) or None,  # None: as it knows the pipeline
    )
    last = pipeline.transformer.transformer_blocks[-1] if hasattr(pipeline.transformer, "transformer_blocks") else None
    text = not getattr(last, "context_pre_only", False)  # SD3's last block returns none, which the calibrator asks for
    calibrator = (
        cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1, enable_encoder_calibrator=text) if taylor else None
    )
    cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=calibrator)


def _geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{value:.3g}") for value in np.geomspace(low, high, count))


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("diffusers MagCache", _magcache, _geometric(0.003, 3, 64), joint=True),
        Peer("diffusers FirstBlockCache", _first_block, _geometric(0.005, 1, 48)),
        Peer("diffusers TaylorSeer", _taylorseer, (2, 3, 4, 5, 6, 7, 8, 10), joint=True),
        Peer("diffusers SeaCache", _seacache, _geometric(0.005, 2, 48)),
        Peer("cache-dit DBCache", partial(_dbcache, taylor=False), _geometric(0.005, 1, 48), package="cache_dit"),
        Peer("cache-dit DBCache+Taylor", partial(_dbcache, taylor=True), _geometric(0.005, 1, 48), package="cache_dit"),
    )
}


def tune(speedup_of: Callable[[float], float], strengths: Sequence[float], targets: Sequence[float]) -> list[float]:
    """For each target speed-up the strength that comes nearest to it; `speedup_of` grows with its argument.

    Bisection over the grid of strengths; what was measured once is not measured again.
    """
    seen: dict[int, float] = {}

    def speedup(place: int) -> float:
        if place not in seen:
            seen[place] = speedup_of(strengths[place])
        return seen[place]

    chosen = []
    for target in targets:
        low, high = 0, len(strengths) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if speedup(middle) < target else (low, middle)
        near = [place for place in (low - 1, low) if place >= 0]
        chosen.append(strengths[min(near, key=lambda place: abs(np.log(speedup(place) / target)))])
    return chosen
