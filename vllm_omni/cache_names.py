"""Settings of other caches by the names that their users type: cache-dit's (DBCache) and SeaCache's. Knows no cache.

What means the same here is renamed; what our rules do in one way only may say so; anything else is refused with what
to give instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from vllm_omni.errors import InvalidValueError, check_keys

MAX_MASK = 10_000
_PLAIN = int | float | str | None

_RENAMED = {
    "residual_diff_threshold": "rel_l1_thresh",
    "max_continuous_cached_steps": "mag_max_skip_steps",
    "sea_threshold": "rel_l1_thresh",
    "sea_max_consecutive_cached": "mag_max_skip_steps",
}
# name -> (the one value that is what is done here, what to give for another)
_FIXED: dict[str, tuple[Any, str]] = {
    "Fn_compute_blocks": (1, "must be 1: the first block decides, and the others are skipped together"),
    "Bn_compute_blocks": (0, "must be 0: all blocks but the first are skipped together"),
    "max_cached_steps": (-1, "must be -1; mag_max_skip_steps bounds the steps in a row, steps_mask says which"),
    "taylorseer_order": (1, "must be 1, which is predictor='linear'"),
    "scm_steps_mask_policy": (None, "is steps_mask here: {'compute': [...], 'skip': [...]} in turns"),
    "scm_steps_policy": ("dynamic", "must be 'dynamic': every skip adds a forecast"),
    "force_refresh_step_hint": (None, "is not needed: each request begins with an empty cache"),
    "force_refresh_step_policy": ("once", "is not needed: each request begins with an empty cache"),
    "sea_power_exp": (None, "is the published filter's: 2 for pictures and 3 for videos; leave it out"),
}
_PREDICTORS: dict[str, dict[Any, str]] = {
    "enable_taylorseer": {False: "reuse", True: "linear"},
    "sea_residual_order": {0: "reuse", 1: "linear"},
}
OURS = {**_RENAMED, **dict.fromkeys(_PREDICTORS, "predictor"), "max_warmup_steps": "mag_retention_ratio"}
OTHER_NAMES = frozenset({*OURS, *_FIXED})


def is_off(name: object) -> bool:
    """Whether a backend's name, or what a request gives as its cache, is a word for no cache at all."""
    return isinstance(name, str) and name.lower() in ("none", "off")


def differ(one: Any, other: Any) -> bool:
    """Whether two settings are not the same; what is no plain value is itself alone, for arrays compare by element."""
    return one is not other and not (isinstance(one, _PLAIN) and isinstance(other, _PLAIN) and one == other)


@contextmanager
def in_their_words(given: Mapping[str, Any], ours: Mapping[str, str]) -> Iterator[None]:
    """Errors within name a setting as it was `given`; `ours` are the names that it has here."""
    try:
        yield
    except InvalidValueError as error:
        if (name := next((name for name in given if ours.get(name) == error.field), None)) is None:
            raise
        raise error.named(name) from None


def in_our_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under the names of `DiffusionCacheConfig`; InvalidValueError for what is not done here."""
    own = {name: value for name, value in values.items() if name not in OTHER_NAMES}
    for name in values.keys() & OTHER_NAMES:
        value = values[name]
        if name in _FIXED:
            only, fix = _FIXED[name]
            if differ(value, only):
                raise InvalidValueError(name, value, fix)
            continue
        target, meant = _meaning(name, value, values)
        if differ(own.setdefault(target, meant), meant):
            raise InvalidValueError(name, value, f"says what {target} says, and another value; give one of them")
    return own


def _meaning(name: str, value: Any, values: Mapping[str, Any]) -> tuple[str, Any]:
    if name in _RENAMED:
        return _RENAMED[name], value
    if name in _PREDICTORS:
        choices = _PREDICTORS[name]
        if not isinstance(value, int | float) or value not in choices:
            raise InvalidValueError(name, value, f"must be one of {', '.join(map(str, choices))}")
        return "predictor", choices[value]
    steps = values.get("num_inference_steps")
    if not isinstance(steps, int) or not isinstance(value, int) or not 0 <= value < steps:
        fix = "is a number of steps: give a larger num_inference_steps with it, or mag_retention_ratio, a share of them"
        raise InvalidValueError(name, value, fix)
    return "mag_retention_ratio", value / steps


def mask_of_bins(value: Mapping[str, Any]) -> tuple[bool, ...]:
    """A mask from {"compute": [6, 2], "skip": [1, 3]}: runs that alternate, computed first (cache-dit's bins)."""
    check_keys("steps_mask", value, ("compute", "skip"))
    runs = [() if value.get(name) is None else value[name] for name in ("compute", "skip")]
    listed = all(isinstance(run, Sequence) for run in runs)
    lengths = [length for run in runs for length in run] if listed else [-1]
    if any(not isinstance(length, int) or length < 0 for length in lengths) or sum(lengths) > MAX_MASK:
        fix = f"must hold lists of whole numbers that add up to at most {MAX_MASK}"
        raise InvalidValueError("steps_mask", value, fix)
    computed, skipped = runs
    pairs = zip_longest(computed, skipped, fillvalue=0)
    return tuple(flag for run, gap in pairs for flag in (True,) * run + (False,) * gap)
